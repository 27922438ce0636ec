"""Named tensors in one safetensors file, or in one for each rank; read one at a time."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vapo_async.learner.ranks import Ranks


def save_share(folder: Path, stem: str, tensors: Iterable[tuple[str, Tensor]], ranks: Ranks) -> None:
    """Writes this rank's share: ``stem.safetensors``, or ``stem-00001-of-00002.safetensors`` and so on.

    Each tensor is for the rank that has the fewest bytes so far; no rank holds more than its share and the tensor that
    just comes. Rank 0 writes the index that Hugging Face's readers look for beside files that are several.

    Args:
        folder: exists.
        stem: of the files' names.
        tensors: the same ones in the same order on all ranks; each is of use until the next one is asked for.
        ranks: who shares.

    Raises:
        OSError, SafetensorError: the disk is full.
    """
    names = [_file_name(stem, rank, ranks.size) for rank in range(ranks.size)]
    own, where, sizes = {}, {}, [0] * ranks.size
    for name, tensor in tensors:
        rank = sizes.index(min(sizes))
        where[name] = names[rank]
        sizes[rank] += tensor.numel() * tensor.element_size()
        if rank == ranks.rank:
            own[name] = tensor.detach().cpu().clone().contiguous()
    save_file(own, folder / names[ranks.rank], metadata={"format": "pt"})
    if ranks.size > 1 and ranks.rank == 0:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": where}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


class TensorFiles(Mapping[str, Tensor]):
    """What :func:`save_share` wrote, by however many ranks. Use it as a context manager.

    Raises:
        FileNotFoundError: there is no such file.
        SafetensorError: a file is broken.
    """

    def __init__(self, folder: Path, stem: str) -> None:
        paths = sorted(folder.glob(f"{stem}.safetensors")) or sorted(folder.glob(f"{stem}-*-of-*.safetensors"))
        if not paths:
            raise FileNotFoundError(f"no {stem}.safetensors in {folder}")
        self._open = ExitStack()
        self._where: dict[str, Any] = {}
        for path in paths:
            file = self._open.enter_context(safe_open(path, "pt"))
            self._where |= dict.fromkeys(file.keys(), file)

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._where[name].get_tensor(name)
        return tensor

    def shapes(self) -> dict[str, list[int]]:
        """By name, without reading the tensors."""
        return {name: file.get_slice(name).get_shape() for name, file in self._where.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def __enter__(self) -> "TensorFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()


def has_critic(checkpoint: Path) -> bool:
    """Whether a learner with a critic wrote it."""
    return any(checkpoint.glob("critic.safetensors")) or any(checkpoint.glob("critic-*-of-*.safetensors"))


def _file_name(stem: str, rank: int, ranks: int) -> str:
    return f"{stem}.safetensors" if ranks == 1 else f"{stem}-{rank + 1:05d}-of-{ranks:05d}.safetensors"
