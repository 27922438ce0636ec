"""Writes a checkpoint's policy or critic as a Hugging Face folder: ``python scripts/export.py FOLDER OUT``."""

import sys
from pathlib import Path

from safetensors import SafetensorError

from vapo_async.config import ConfigError, RunError

USAGE = """\
usage: python scripts/export.py FOLDER OUT [--critic] [--dtype float32|bfloat16|float16]

FOLDER is a run (its newest whole checkpoint) or a checkpoint; OUT is made and must not exist. It holds safetensors,
config.json, the generation settings and the tokenizer:
  the policy loads in AutoModelForCausalLM and in vLLM;
  with --critic, the critic loads in AutoModelForTokenClassification with one label, whose logit at a token is the
  value of the state after it; model.critic_path=OUT starts another run's critic from its backbone.

  --dtype   of the weights; without it, as they were trained
"""


def main(arguments: list[str]) -> int:
    """Exit code: 0 written, 1 failed, 2 a mistake in what was asked for."""
    if not arguments or any(argument in ("-h", "--help") for argument in arguments):
        print(USAGE, end="")
        return 0 if arguments else 2
    try:
        source, out, critic, dtype = _split(arguments)
        from vapo_async.checkpoint import checkpoint_of
        from vapo_async.export import export_critic, export_policy

        checkpoint = checkpoint_of(source, lambda text: print(text, file=sys.stderr))
        if checkpoint is None:
            raise ConfigError(f"{source} is no run and no checkpoint of one: expected checkpoints/ or policy/ in it")
        done = (export_critic if critic else export_policy)(checkpoint, out, dtype)
    except (ConfigError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except (OSError, SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())
        print(f"error: {out} could not be written: {reason}; make room, or give another folder", file=sys.stderr)
        return 1
    print(f"from          {checkpoint}")
    print(f"architecture  {done.architecture}, {done.parameters:,} parameters in {done.dtype}")
    print(f"written to    {done.folder} ({done.files} file{'s' if done.files > 1 else ''} of weights)")
    return 0


def _split(arguments: list[str]) -> tuple[Path, Path, bool, str | None]:
    """Source, target, whether it is the critic that is wanted, dtype."""
    places: list[Path] = []
    critic, dtype = False, None
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name == "--critic" and not equals:
            critic = True
        elif name == "--dtype":
            dtype = value if equals else next(rest, "")
            if dtype not in ("float32", "bfloat16", "float16"):
                raise ConfigError(f"--dtype is '{dtype}', expected float32, bfloat16 or float16")
        elif name.startswith("-"):
            raise ConfigError(f"unknown option '{argument}'; there are --critic and --dtype")
        else:
            places.append(Path(argument).expanduser())
    if len(places) != 2:
        raise ConfigError(f"expected FOLDER and OUT, found {len(places)} folder{'s' if len(places) != 1 else ''}")
    return places[0], places[1], critic, dtype


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
