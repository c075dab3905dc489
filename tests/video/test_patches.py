"""`runner.patches`: mmaction2 beside an mmcv that it asserts against; nothing where it imports by itself."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(code: str, *folders: Path) -> list[str]:
    """What a fresh process prints that runs `code`; `folders` are searched first."""
    path = os.pathsep.join(str(folder) for folder in (*folders, ROOT))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, env=os.environ | {"PYTHONPATH": path},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_mmaction_alone_does_not_import() -> None:
    """If this fails, a release of mmaction2 has made the shim superfluous."""
    run("""
        import mmcv
        try:
            import mmaction
        except AssertionError as error:
            assert "MMCV" in str(error)
        else:
            raise SystemExit("mmaction takes this mmcv")
        mmcv.__version__ = "2.1.0"
        try:
            import mmaction.models.localizers
        except ModuleNotFoundError as error:
            assert error.name == "mmaction.models.localizers.drn"
        else:
            raise SystemExit("mmaction's wheel has DRN")
    """)


@pytest.mark.slow
@pytest.mark.parametrize("hidden", ["", "importlib_metadata"])
def test_the_shim_leaves_everything_else_as_it_was(hidden: str) -> None:
    run(f"""
        import sys
        if {hidden!r}:
            sys.modules[{hidden!r}] = None
        import mmcv
        from runner.patches import import_framework
        import_framework("mmdet")
        version, before = mmcv.__version__, dict(sys.modules)
        import_framework("mmaction")
        assert mmcv.__version__ == version
        assert {{name: sys.modules.get(name) for name in before}} == before
        assert not [name for name in sys.modules if "localizers.drn" in name]
        assert ("importlib_metadata" in sys.modules) == ({hidden!r} == "importlib_metadata")
        from mmaction.models.localizers import DRN
        from mmaction.registry import DATASETS, METRICS, MODELS, TRANSFORMS
        for registry, name in ((MODELS, "Recognizer3D"), (MODELS, "I3DHead"), (DATASETS, "VideoDataset"),
                               (METRICS, "AccMetric"), (TRANSFORMS, "DecordDecode")):
            assert registry.get(name).__module__.startswith("mmaction."), name
        try:
            DRN()
        except ImportError as error:
            assert "not in the published package" in str(error)
        else:
            raise SystemExit("DRN was built")
        import_framework("mmaction")  # again
    """)


@pytest.mark.slow
def test_only_the_commands_of_video_import_mmaction() -> None:
    code = """
        import sys
        import video
        import detection.train, video.train, video.predict, video.check
        assert not [name for name in sys.modules if name.split(".")[0] in ("mmaction", "mmcv", "mmengine")]
        from detection.train import main
        assert main(["mask-rcnn_swin-t-p4-w7_fpn_1x_coco", "--device", "cpu"]) == 2  # there is no data
        assert "mmdet" in sys.modules
        assert "mmaction" not in sys.modules
    """
    run(code)


FILES = {
    "mmcv/__init__.py": "__version__ = '{mmcv}'",
    "mmdet/__init__.py": "",
    "mmdet/datasets.py": "",
    "mmaction/__init__.py": """
        import mmcv
        assert mmcv.__version__ < '2.2', 'MMCV==' + mmcv.__version__
    """,
    "mmaction/models/__init__.py": """
        import sys
        seen = [name for name in sys.modules if name.endswith(('.drn', 'importlib_metadata'))]
    """,
    "mmaction/utils/__init__.py": """
        def register_all_modules(init_default_scope):
            import mmaction.models
            from importlib_metadata import PackageNotFoundError, distribution
            mmaction.models.source = distribution.__module__
            try:
                mmaction.models.transformers = distribution('transformers').version
            except PackageNotFoundError:
                mmaction.models.transformers = None
    """,
    "importlib_metadata.py": """
        from importlib.metadata import PackageNotFoundError, distribution as _distribution
        def distribution(name):
            return _distribution(name)
    """,
    "transformers-{transformers}.dist-info/METADATA": """
        Metadata-Version: 2.1
        Name: transformers
        Version: {transformers}
    """,
    "mmaction/models/localizers/drn/__init__.py": "",
}
SHOW = """
    from runner.patches import import_framework
    import_framework("mmaction")
    import mmaction.models, mmcv, sys
    print(mmcv.__version__, mmaction.models.source, mmaction.models.transformers, sorted(mmaction.models.seen))
    print("importlib_metadata" in sys.modules, [name for name in sys.modules if name.endswith(".drn")])
"""
WORLDS = {
    "all well": ({}, [], "2.1.0 importlib_metadata 4.40.0 []", "True []"),
    "newer mmcv": ({"mmcv": "2.3.6"}, [], "2.3.6 importlib_metadata 4.40.0 []", "True []"),
    "no DRN": (
        {}, ["mmaction/models/localizers/drn/__init__.py"],
        "2.1.0 importlib_metadata 4.40.0 ['mmaction.models.localizers.drn', 'mmaction.models.localizers.drn.drn']",
        "True []",
    ),
    "newer transformers": (
        {"transformers": "5.23.0"}, [], "2.1.0 runner.patches None ['importlib_metadata']", "False []"
    ),
}  # fmt: skip


@pytest.mark.parametrize("world", WORLDS)
def test_only_what_is_in_the_way_is_replaced(world: str, tmp_path: Path) -> None:
    """With stand-ins for the packages: a release that needs one of the measures, or none."""
    versions, missing, seen, after = WORLDS[world]
    versions = {"mmcv": "2.1.0", "transformers": "4.40.0"} | versions
    for name, content in FILES.items():
        if name not in missing:
            path = tmp_path / name.format(**versions)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(content.format(**versions)).lstrip())
    assert run(SHOW, tmp_path) == [seen, after]
