"""Adapters of PEFT, such as LoRA: weights that change a model, and that nothing here applies."""

from pathlib import Path

from s3d_jax.errors import CheckpointError
from s3d_jax.storage.json_files import read_json_object

ADAPTER_CONFIG = "adapter_config.json"
_FILES = (ADAPTER_CONFIG, "adapter_model.safetensors", "adapter_model.bin")


def adapter_problem(folder: Path, name: str = "") -> str:
    """Why a folder that holds an adapter is refused, and what to do; "" if it holds none.

    Args:
        folder: the folder.
        name: as the user knows it, if not by its path.
    """
    files = [file for file in _FILES if (folder / file).is_file()]
    if not files:
        return ""
    try:
        fields = read_json_object(folder / ADAPTER_CONFIG)
    except CheckpointError:
        fields = {}
    kind, base = fields.get("peft_type") or "LORA", fields.get("base_model_name_or_path") or "BASE"
    has_model = (folder / "config.json").is_file()
    what = "next to a model, and the adapter would be left out" if has_model else "and no model"
    alone = "; or remove these files from a copy, to have the model alone" if has_model else ""
    return (
        f"{name or folder} holds an adapter ({kind!s:.20}: {', '.join(files)}) {what}. Merge "
        f"it into its model first, in Python:\n"
        f"  base = transformers.AutoModelForCausalLM.from_pretrained({base!r:.200})\n"
        f"  model = peft.PeftModel.from_pretrained(base, {name or str(folder)!r})\n"
        f"  model.merge_and_unload().save_pretrained('merged')\n"
        f"Then convert that folder, with --tokenizer for the tokenizer{alone}"
    )
