"""How signals and gradients fare from block to block: the figures of SwinV2's Figure 1 (arXiv:2111.09883), and more."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .atomic import whole_file
from .backbone import Backbone
from .classifier import Classifier
from .images import Reading
from .model_file import ModelFile
from .ops import use_attention
from .plots import BLUE, MUTED, new_figure, style
from .predict import image_batches

MOST_LOGITS = 2**24  # that are looked at together: 64 MiB
# figure -> its title in the picture, and whether its axis is logarithmic
PANELS = {
    "variance": ("Feature variance", True),
    "entropy": ("Attention entropy, share of the largest", False),
    "logit": ("Largest attention logit", False),
    "grad_norm": ("Gradient norm", True),
}
# of which classes the gradients are -> in words
GRADIENTS = {
    "folders": "gradients of the cross-entropy to the classes of the folders",
    "predictions": "gradients of the cross-entropy to the model's own most probable classes",
    None: "no gradients, for the model has no head",
}


@dataclass(frozen=True, kw_only=True)
class BlockDiagnosis:
    """What happens in one block.

    Attributes:
        block: its name in the backbone, `stages.2.blocks.5`.
        variance: of its output, the residual network's main branch: of each channel over pictures and positions, then
            the mean over the channels (the average channel variance of arXiv:2101.08692, Sec. 3).
        entropy: of the attention weights, the mean over pictures, heads and queries, as a share of the logarithm of
            the number of keys: 1 where all keys count alike, 0 where one takes all. Padding of windows counts, as the
            model attends to it. None without attention, or of one key.
        logit: the largest that a softmax takes, with position bias and mask. None without attention.
        grad_norm: L2 norm of the loss's gradient with respect to the block's parameters. None where there is none.
    """

    block: str
    variance: float
    entropy: float | None
    logit: float | None
    grad_norm: float | None = None


def blocks_of(backbone: Backbone) -> dict[str, nn.Module]:
    """The blocks by their names, in the order in which they are passed."""
    stages = enumerate(backbone.stages)
    return {f"stages.{i}.blocks.{j}": block for i, stage in stages for j, block in enumerate(stage.blocks)}


class _Attention(TorchFunctionMode):
    """Keeps the sums of every attention that is computed within."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.seen.append(_attention_sums(*args, **kwargs))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def _attention_sums(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *_: Any, scale: float | None = None, **__: Any
) -> Tensor:
    """The sum of the entropies of all queries, their number (0 for one key), and the largest logit: (3,).

    Args:
        q, k, v: (B, heads, N, head_dim), (B, heads, M, head_dim) twice.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    wide = torch.promote_types(q.dtype, torch.float32)
    entropies, largest = [], []
    together = max(1, MOST_LOGITS // (q[0, :, :, 0].numel() * k.shape[-2]))
    for queries, keys in zip(q.split(together), k.split(together), strict=True):
        with torch.autocast(q.device.type, enabled=False):
            logits = queries.to(wide) * scale @ keys.to(wide).mT
        if attn_mask is not None:
            logits = logits + attn_mask
        log_weights = logits.log_softmax(-1)
        entropies.append(-(log_weights.exp() * log_weights).sum())
        largest.append(logits.amax())
    entropy = torch.stack(entropies).sum() / math.log(max(k.shape[-2], 2))
    rows = q[..., 0].numel() if k.shape[-2] > 1 else 0
    return torch.stack([entropy, torch.full_like(entropy, rows), torch.stack(largest).amax()])


class Observer:
    """Looks at the blocks of a backbone in every forward pass within `watching`, whatever the mode and the dtype.

    It reads what the blocks give and what `scaled_dot_product_attention` takes, and changes no result: but within, all
    attention is computed by that operator, and nothing is compiled.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.blocks = blocks_of(backbone)
        # of each pass: positions, mean and variance of the channels; sums of attention
        self._outputs: dict[str, list[tuple[int, Tensor, Tensor]]] = {name: [] for name in self.blocks}
        self._attention: dict[str, list[Tensor]] = {name: [] for name in self.blocks}

    @contextmanager
    def watching(self) -> Iterator[None]:
        attention = _Attention()

        @torch.no_grad()
        def look(name: str, block: nn.Module, args: Any, output: Tensor) -> None:
            tokens = output.flatten(0, -2)
            variance, mean = torch.var_mean(
                tokens.to(torch.promote_types(tokens.dtype, torch.float32)), 0, correction=0
            )
            self._outputs[name].append((len(tokens), mean, variance))
            self._attention[name] += attention.seen
            attention.seen.clear()

        handles = [block.register_forward_hook(partial(look, name)) for name, block in self.blocks.items()]
        try:
            with attention, use_attention("sdpa"), torch.compiler.set_stance("force_eager"):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def diagnoses(self) -> list[BlockDiagnosis]:
        """Of all passes so far, without gradients; the one wait for the device."""
        found = []
        for name in self.blocks:
            counts = torch.tensor([count for count, _, _ in self._outputs[name]], dtype=torch.float64)[:, None]
            mean = torch.stack([mean for _, mean, _ in self._outputs[name]]).cpu().double()
            within = torch.stack([variance for _, _, variance in self._outputs[name]]).cpu().double()
            share = counts / counts.sum()
            between = (mean - (share * mean).sum(0)).square()
            entropy = logit = None
            if self._attention[name]:
                entropies, rows, largest = torch.stack(self._attention[name]).cpu().double().unbind(1)
                entropy = float(entropies.sum() / rows.sum()) if rows.sum() else None
                logit = float(largest.max())
            found.append(
                BlockDiagnosis(
                    block=name,
                    variance=float((share * (within + between)).sum(0).mean()),
                    entropy=entropy,
                    logit=logit,
                )
            )
        return found


def gradient_norms(backbone: Backbone) -> dict[str, float]:
    """L2 norm of the gradient that the parameters of each block hold; of those that hold any. A collective call."""
    norms = {}
    for name, block in blocks_of(backbone).items():
        gradients = [parameter.grad for parameter in block.parameters() if parameter.grad is not None]
        if gradients:
            norm = nn.utils.get_total_norm(gradients)
            norms[name] = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return dict(zip(norms, torch.stack(list(norms.values())).tolist(), strict=True)) if norms else {}


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Within, the model is in eval mode; afterwards each module in its own again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def diagnose(model: Backbone | Classifier, batches: Iterable[tuple[Tensor, Tensor | None]]) -> list[BlockDiagnosis]:
    """The blocks of a model in eval mode, over all pictures of all batches.

    Args:
        model: of a backbone, or a classifier without classes, there are no gradients. Those it holds are cleared.
        batches: images (B, C, H, W), or clips (B, C, T, H, W), on the model's device, and their classes (B,), to which
            the gradients of the mean cross-entropy are taken; None for those that the model itself finds most probable.

    Returns:
        A row per block; none where there are no batches.

    Raises:
        InputError: images that do not fit the model.
    """
    classifier = model if isinstance(model, Classifier) and model.num_classes else None
    backbone = model.backbone if isinstance(model, Classifier) else model
    observer, count = Observer(backbone), 0
    model.zero_grad()
    with eval_mode(model), observer.watching(), torch.set_grad_enabled(classifier is not None):
        for images, classes in batches:
            count += len(images)
            logits = model(images)
            if classifier is not None:
                classes = logits.argmax(-1) if classes is None else classes
                wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
                F.cross_entropy(wide, classes, reduction="sum").backward()
    norms = gradient_norms(backbone)
    model.zero_grad()
    blocks = observer.diagnoses() if count else []
    return [replace(block, grad_norm=norms[block.block] / count if block.block in norms else None) for block in blocks]


def folder_classes(
    pictures: Sequence[Path], folder: Path, names: Sequence[str] | None, num_classes: int
) -> dict[Path, int] | None:
    """The class of each picture by the sub-folder of `folder` it lies in; None where these are not the model's classes.

    Args:
        names: of the model's classes, all of which are not needed. Where they are unknown, there must be as many
            sub-folders as classes, which are then numbered in the order of their names, or of the numbers these are.
    """
    inner = {path: path.relative_to(folder).parts[:-1] for path in pictures}
    if not all(inner.values()):
        return None
    found = {parts[0] for parts in inner.values()}
    if names is not None:
        position = {name: index for index, name in enumerate(names)}
    else:
        ordered = sorted(found, key=lambda name: (int(name) if name.isdecimal() else 0, name))
        position = {name: index for index, name in enumerate(ordered)} if len(ordered) == num_classes else {}
    return {path: position[parts[0]] for path, parts in inner.items()} if found <= position.keys() else None


def diagnose_pictures(
    opened: ModelFile, pictures: Sequence[Path], folder: Path, device: torch.device, *, most: int, batch_size: int,
    reading: Reading[Path],
) -> tuple[list[BlockDiagnosis], dict[str, Any]]:  # fmt: skip
    """`diagnose` of a model's file on pictures of a folder, and what it was done on.

    Args:
        most: pictures that are taken, one out of so many all along the list.
        batch_size: pictures at a time.
        reading: passes over the unreadable ones. Where all are, there are no blocks.

    Returns:
        The blocks; the model, its weights, the number of pictures, and of which classes the gradients are: those of
        "folders", or the model's own "predictions"; None for no gradients.

    Raises:
        InputError: pictures, or numbers of channels, that cannot be read.
    """
    model = opened.classifier() if opened.num_classes else opened.backbone()
    classes = folder_classes(pictures, folder, opened.class_names, opened.num_classes)
    chosen = pictures[:: math.ceil(len(pictures) / most)]

    def batches() -> Iterator[tuple[Tensor, Tensor | None]]:
        done = 0
        for images in image_batches(chosen, opened.preprocessing, device, batch_size, reading):
            paths, done = reading.done[done:], len(reading.done)
            yield images, None if classes is None else torch.tensor([classes[path] for path in paths], device=device)

    blocks = diagnose(model.to(device), batches())
    of = ("predictions" if classes is None else "folders") if opened.num_classes else None
    facts = {"model": opened.name, "weights": opened.source, "pictures": len(reading.done), "classes": of}
    return blocks, facts


def table(blocks: Sequence[BlockDiagnosis]) -> str:
    """A line per block."""
    lines = [f"{'block':18}{'variance':>12}{'entropy':>12}{'logit':>12}{'gradient':>12}"]
    for block in blocks:
        numbers = (block.variance, block.entropy, block.logit, block.grad_norm)
        lines.append(f"{block.block:18}" + "".join(f"{'-' if n is None else f'{n:.4g}':>12}" for n in numbers))
    return "\n".join(lines)


def write_report(path: Path, blocks: Sequence[BlockDiagnosis], facts: Mapping[str, Any]) -> None:
    """Write the figures of all blocks as a picture, and with the `facts` about them as JSON beside it; each whole.

    What is no number is null there.

    Args:
        path: of the picture, a PNG; the JSON has its name and the suffix .json.
        facts: as `diagnose_pictures` returns them.

    Raises:
        InputError: they cannot be written.
    """
    weights = "/".join(Path(facts["weights"]).parts[-2:])
    figure = new_figure(11, 6.4, f"{facts['model']}, weights {weights}, {facts['pictures']} pictures")
    numbers = range(1, len(blocks) + 1)
    stages = [block.block.split(".")[1] for block in blocks]
    for axes, (name, (panel, logarithmic)) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        values = [_finite(getattr(block, name)) for block in blocks]
        axes.plot(numbers, [math.nan if n is None else n for n in values], color=BLUE, marker="o", markersize=3.5)
        axes.set_title(panel)
        positive = [n for n in values if n]
        if logarithmic and positive:
            low, high = min(positive), max(positive)
            room = 1.2 * max(1.0, 10 * low / high) ** 0.5  # a decade at least: what hardly changes shall look so
            axes.set_yscale("log")
            axes.set_ylim(low / room, high * room)
        if name == "entropy":
            axes.set_ylim(0, 1.02)
        for number in numbers[1:]:
            if stages[number - 1] != stages[number - 2]:
                axes.axvline(number - 0.5, color=MUTED, linestyle=":", linewidth=1)
        axes.set_xlim(0.5, len(blocks) + 0.5)
        style(axes, "block; dotted: a new stage")
    rows = [{key: _finite(n) if isinstance(n, float) else n for key, n in asdict(block).items()} for block in blocks]
    text = json.dumps({**facts, "blocks": rows}, indent=2) + "\n"
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=110)
    with whole_file(path.with_suffix(".json")) as temporary:
        temporary.write_text(text)


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None
