"""The same graph on a GPU: close to the CPU's pixels, ordered on torch's stream, safe to keep."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from maestri.pipelines.colour import ColourConfig
from maestri.pipelines.config import DataConfig
from maestri.pipelines.corruption import CorruptionConfig
from maestri.pipelines.evaluation import evaluation_batches
from maestri.pipelines.filters import BlurConfig
from maestri.pipelines.loader import Loader
from maestri.pipelines.show import hidden_pixels
from maestri.pipelines.views import GLOBAL, LocalConfig, ViewsConfig

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class _MemoryShardSet:
    """Smooth colour images as JPEGs in memory, with a ShardSet's methods."""

    def __init__(self, count: int, *, subsampling: str) -> None:
        rng = np.random.default_rng(0)
        self._encoded = []
        sizes = rng.integers(80, 320, (count, 2))
        for width, height in sizes.tolist():
            y, x = np.mgrid[:height, :width]
            planes = [128 + 90 * np.sin(x / rng.uniform(6, 30) + y / rng.uniform(6, 30)) for _ in range(3)]
            buffer = io.BytesIO()
            image = Image.fromarray(np.stack(planes, -1).astype(np.uint8))
            image.save(buffer, "JPEG", quality=95, subsampling=subsampling)
            self._encoded.append(buffer.getvalue())
        self.manifest = SimpleNamespace(recipe="memory")
        self.columns = SimpleNamespace(width=sizes[:, 0], height=sizes[:, 1], shard=np.zeros(count, np.int64))

    def __len__(self) -> int:
        return len(self._encoded)

    def label(self, rows):
        return np.asarray(rows) % 10

    def key(self, row: int) -> str:
        return str(row)

    def read_checked(self, rows):
        return [self._encoded[row] for row in rows]


def _loader(shard_set, device: str, executor: str = "dali", **changes) -> Loader:
    views = ViewsConfig(size=96, **changes)
    return Loader(
        shard_set,
        config=DataConfig(shards="", executor=executor),
        views=views,
        patch=16,
        seed=1,
        rank=0,
        world_size=1,
        global_size=16,
        device=torch.device(device),
    )


# 4:4:4 differs by the decoder's rounding alone; 4:2:0 also by how chroma is upsampled.
@pytest.mark.parametrize(("subsampling", "bound"), [("4:4:4", 1.0), ("4:2:0", 1.5)])
@pytest.mark.parametrize("interpolation", ["linear", "cubic"])
def test_loader__gpu_equals_cpu(subsampling: str, bound: float, interpolation: str) -> None:
    shard_set = _MemoryShardSet(48, subsampling=subsampling)
    with _loader(shard_set, "cpu", interpolation=interpolation) as cpu:
        expected = [next(cpu) for _ in range(3)]
    with _loader(shard_set, "cuda", interpolation=interpolation) as gpu:
        batches = [next(gpu) for _ in range(3)]
    for batch, other in zip(batches, expected, strict=True):
        assert batch.views[GLOBAL].device.type == "cuda"
        assert batch.views[GLOBAL].dtype == torch.uint8
        assert batch.views[GLOBAL][0].is_contiguous(memory_format=torch.channels_last)
        difference = (batch.views[GLOBAL].cpu().int() - other.views[GLOBAL].int()).abs().float()
        assert difference.mean() <= bound
        for name in ("labels", "rows"):
            assert torch.equal(getattr(batch, name).cpu(), getattr(other, name))
        for name in ("token_mask", "visible", "masked"):
            assert getattr(batch, name)[GLOBAL].device.type == "cuda"
            assert torch.equal(getattr(batch, name)[GLOBAL].cpu(), getattr(other, name)[GLOBAL])


@pytest.mark.parametrize("count", [1, 2])
def test_loader__gpu_batches_are_not_overwritten(count: int) -> None:
    shard_set = _MemoryShardSet(48, subsampling="4:4:4")
    with _loader(shard_set, "cuda", count=count) as loader:
        first = [next(loader).views[GLOBAL] for _ in range(6)]
        torch.cuda.synchronize()
        copies = [views.clone() for views in first]
        for _ in range(12):
            next(loader)
    torch.cuda.synchronize()
    assert all(torch.equal(views, copy) for views, copy in zip(first, copies, strict=True))


_EVERYTHING = {
    "colour": ColourConfig(brightness=0.4, contrast=0.2, saturation=0.2, hue=0.1, grey=0.2),
    "blur": BlurConfig(probability=(1.0, 0.3)),
    "solarise": (0.0, 0.3),
    "corruption": CorruptionConfig(coverage=0.5, noise=0.3),
    "local": LocalConfig(count=3, size=48, blur=(0.5,)),
}


def test_loader__gpu_equals_cpu_with_every_filter() -> None:
    shard_set = _MemoryShardSet(48, subsampling="4:4:4")
    with _loader(shard_set, "cpu", **_EVERYTHING) as cpu, _loader(shard_set, "cuda", **_EVERYTHING) as gpu:
        batches = [(next(cpu), next(gpu)) for _ in range(3)]
    for expected, batch in batches:
        assert set(batch.views) == {"global", "global_corrupted", "local"}
        for name, views in batch.views.items():
            difference = (views.cpu().int() - expected.views[name].int()).abs().float()
            # A level at the threshold may be solarised on one side alone, so single pixels differ by far.
            assert difference.mean() <= 1.5, name
        clean, corrupted = batch.views["global"], batch.views["global_corrupted"]
        hidden = hidden_pixels(batch.token_mask["global"], 96)[:, :, None].expand_as(clean)
        assert torch.equal(clean[~hidden], corrupted[~hidden])
        assert (clean[hidden] != corrupted[hidden]).float().mean() > 0.8


def test_loader__threads_copy_to_the_gpu() -> None:
    shard_set = _MemoryShardSet(48, subsampling="4:2:0")
    with (
        _loader(shard_set, "cpu", "threads", **_EVERYTHING) as cpu,
        _loader(shard_set, "cuda", "threads", **_EVERYTHING) as gpu,
    ):
        for _ in range(5):
            expected, batch = next(cpu), next(gpu)
            for name, views in batch.views.items():
                assert views.device.type == "cuda"
                assert torch.equal(views.cpu(), expected.views[name]), name


def test_loader__gpu_orders_on_the_current_stream() -> None:
    shard_set = _MemoryShardSet(48, subsampling="4:4:4")
    with _loader(shard_set, "cuda") as loader:
        expected = [next(loader).views[GLOBAL].sum(dtype=torch.int64).item() for _ in range(9)]
    stream = torch.cuda.Stream()
    sums = []
    with _loader(shard_set, "cuda") as loader, torch.cuda.stream(stream):
        for _ in range(9):
            # Work that keeps the stream busy, so that the copy out of DALI's memory runs long after it was queued.
            torch.cuda._sleep(20_000_000)
            sums.append(next(loader).views[GLOBAL].sum(dtype=torch.int64))
    stream.synchronize()
    assert [int(total) for total in sums] == expected


def test_loader__gpu_resume_is_bit_equal() -> None:
    shard_set = _MemoryShardSet(48, subsampling="4:2:0")
    with _loader(shard_set, "cuda") as loader:
        next(loader)
        state = loader.state_dict()
        expected = next(loader).views[GLOBAL].cpu()
    with _loader(shard_set, "cuda") as loader:
        loader.load_state_dict(state)
        assert torch.equal(next(loader).views[GLOBAL].cpu(), expected)


def test_evaluation_batches__gpu() -> None:
    shard_set = _MemoryShardSet(20, subsampling="4:4:4")
    options = {"size": 64, "crop_fraction": 0.875, "batch_size": 8, "num_threads": 2}
    rows = np.arange(20)
    gpu = list(evaluation_batches(shard_set, rows, device=torch.device("cuda"), **options))
    cpu = list(evaluation_batches(shard_set, rows, device=torch.device("cpu"), **options))
    assert [len(labels) for _, labels in gpu] == [8, 8, 4]
    for (images, labels), (cpu_images, cpu_labels) in zip(gpu, cpu, strict=True):
        assert torch.equal(labels.cpu(), cpu_labels)
        assert (images.cpu().int() - cpu_images.int()).abs().float().mean() <= 1.0
