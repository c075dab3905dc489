"""`python -m detection.export` and its like: what comes before the heads as one graph for other runtimes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from hvt_backbones.cli import add_graph_options
from hvt_backbones.export import check_arguments, export_graph, report
from hvt_backbones.exported import Facts
from hvt_backbones.weights.published import Preprocessing

from . import patches
from .application import Application
from .config import open_config
from .devices import use_device
from .run import build_parser, load_model

SIDE = 256  # which the strides of all levels divide


class BeforeHeads(nn.Module):
    """Prepared images (B, C, H, W) -> the maps of a detector's or segmentor's backbone and neck."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model.extract_feat(images))


class OneClip(nn.Module):
    """Prepared clips (B, C, T, H, W) -> a recognizer's logits (B, classes)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = model.backbone.eval(), model.cls_head.eval()

    def forward(self, clips: Tensor) -> Tensor:
        return self.head(self.backbone(clips))


def export(argv: Sequence[str] | None, application: Application) -> None:
    """Write the graph of a configuration's model with the weights of a checkpoint."""
    clips = len(application.shape) == 3
    what = "a recognizer of single clips" if clips else "backbone and neck; heads and their NMS are left to mmdeploy"
    parser = build_parser(application, "export", f"Write a graph for images of every size: {what}.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a file or a URL")
    add_graph_options(parser)
    args = parser.parse_args(argv)
    check_arguments(args.output, args.format, half=args.half, int8=False, torchscript=args.torchscript)
    patches.apply(application.scope)
    cfg = open_config(args.config, args.cfg_options, application)
    device = use_device(args.device if args.format == "aoti" else "cpu")
    model = load_model(cfg, args.checkpoint, device, needs_classes=False)
    graph = OneClip(model) if clips else BeforeHeads(model)
    own = (8, *application.shape[1:]) if clips else tuple(side // 2 for side in application.shape)  # checks take long
    classes = model.dataset_meta.get("classes")
    with torch.no_grad():
        maps = () if clips else graph(torch.zeros(1, 3, SIDE, SIDE, device=device))
    facts = Facts(
        model=Path(cfg.filename).stem,
        outputs=["logits"] if clips else [f"level{index}" for index in range(len(maps))],
        strides=[SIDE // y.shape[-2] for y in maps],
        num_classes=model.cls_head.num_classes if clips else 0,
        class_names=None if classes is None else list(classes),
        size=args.static,
        preprocessing=_preprocessing(model, application.shape[-2:]),
    )
    errors = export_graph(
        graph, args.output, facts, format=args.format, own=own, half=args.half, torchscript=args.torchscript
    )
    report(args.output, errors)


def _preprocessing(model: nn.Module, size: tuple[int, ...]) -> Preprocessing:
    """Of pixels from 0 to 1, in RGB; how pictures are resized is the pipeline's."""
    preprocessor = model.data_preprocessor
    if not hasattr(preprocessor, "mean"):
        return Preprocessing(input_size=(3, *size), mean=(0.0,) * 3, std=(1.0,) * 3)
    mean, std = (tuple((numbers.flatten() / 255).tolist()) for numbers in (preprocessor.mean, preprocessor.std))
    return Preprocessing(input_size=(3, *size), mean=mean, std=std)
