"""Problems, prompts and the resumable stream that hands them out."""
