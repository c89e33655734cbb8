"""Does a model folder hold a scalar head? Answered from its config and the headers of its weights, without torch.

A reward model is what transformers calls a sequence classifier with one label: a trunk and a linear head to one number.
"""

import json
from pathlib import Path
from typing import Any

from rlhf.errors import BadInput
from rlhf.models.resolve import BUILT, check_model, check_weights, read_config, resolve
from rlhf.places import expanded

EXPECTED = (
    "expected a sequence classifier with one label: a folder that a run of algorithm reward_model wrote, or one that "
    "AutoModelForSequenceClassification saved with num_labels=1"
)


def check_reward_model(name: str, key: str, *, fetch: bool) -> None:
    """Raises BadInput, with the key, unless the model can be had and has a head with one output.

    Without `fetch` nothing of a hub model but its config is looked for; with it the model is downloaded.
    """
    if name in BUILT:
        raise BadInput(f"{key}: {name} is a language model without a scalar head; {EXPECTED}")
    try:
        check_model(name)
        folder = resolve(name) if fetch or expanded(name).is_dir() else None
        if folder is not None:
            check_score_head(folder, key)
    except BadInput as error:
        raise BadInput(str(error).replace("model.name", key)) from error


def check_language_model(name: str, key: str) -> None:
    """Raises BadInput for a model that scores: with tied embeddings it would pass for one that writes."""
    if name in BUILT:
        return
    kinds = read_config(name).get("architectures")
    if isinstance(kinds, list) and any(str(kind).endswith("ForSequenceClassification") for kind in kinds):
        raise BadInput(f"{key}: {name} is a reward model or ranker ({kinds[0]}); expected a language model")


def check_score_head(folder: Path, key: str) -> None:
    """Raises BadInput unless config.json names a sequence classifier with one label and the weights hold its head."""
    config = json.loads((folder / "config.json").read_text())
    kinds = config.get("architectures") or ["no architecture"]
    names = config.get("id2label")
    labels = len(names) if isinstance(names, dict) else config.get("num_labels", 2)
    kind = str(kinds[0] if isinstance(kinds, list) else kinds)
    if not kind.endswith("ForSequenceClassification"):
        raise BadInput(f"{key}: {folder}/config.json names {kind}, which has no scalar head; {EXPECTED}")
    if labels != 1:
        raise BadInput(f"{key}: the head of {folder} has {labels} outputs (labels in config.json); {EXPECTED}")
    shapes = _shapes(folder)
    if shapes is not None and not any(len(shape) == 2 and shape[0] == 1 for shape in shapes.values()):
        raise BadInput(
            f"{key}: {folder} has no tensor of shape (1, hidden size), so its head is missing and would be made "
            f"up; {EXPECTED}"
        )


def _shapes(folder: Path) -> dict[str, list[int]] | None:
    """Shapes by tensor name out of the safetensors headers; None for weights in another format. Raises BadInput for a
    file that is not whole, also one beside those that the model's index names."""
    files = sorted(folder.glob("*.safetensors"))
    found: dict[str, list[int]] = {}
    for file in files:
        check_weights(file)
        with file.open("rb") as stream:
            header: dict[str, Any] = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        found |= {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    return found if files else None
