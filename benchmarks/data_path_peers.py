"""The data paths that ``data_path.py`` compares: each an endless iterator of batches, all doing the same work.

Each view is a random resized crop to uint8, bilinear and antialiased, mirrored in half of the cases, of a picture drawn
from all.  What a library does differently is said in its function.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from data_path_graphs import dali, ffcv, spdl
from data_path_job import BATCH, ENDLESS, LARGE, RATIO, SMALL, Crops, Job, Run
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision.io import ImageReadMode, decode_image, read_file

# ------------------------------------------------------------------------------------------------------------- ours


def ours(job: Job, *, executor: Any, folder: Path) -> Run:
    """Runs our loader on a set of shards; nothing is hidden from the student, as peers make no masks."""
    from maestri.pipelines.config import DataConfig
    from maestri.pipelines.loader import Loader
    from maestri.pipelines.masks import MaskConfig
    from maestri.pipelines.views import LocalConfig, ViewsConfig
    from maestri.shards.shard_set import ShardSet

    num_small = sum(size == 96 for size, _ in job.views)
    interpolation: Any = job.interpolation
    loader = Loader(
        ShardSet.open(folder),
        config=DataConfig(shards=str(folder), executor=executor, num_threads=job.workers),
        views=ViewsConfig(
            count=len(job.views) - num_small,
            scale=LARGE,
            ratio=RATIO,
            interpolation=interpolation,
            mask=MaskConfig(ratio=0.0),
            local=LocalConfig(count=num_small, scale=SMALL),
        ),
        patch=16,
        seed=0,
        rank=0,
        world_size=1,
        global_size=BATCH,
        device=torch.device("cpu"),
    )
    return Run((list(batch.views.values()) for batch in loader), loader.stages.seconds)


# ------------------------------------------------------------------------------------- torchvision, PIL, webdataset


class Files(Dataset[list[Tensor]]):
    """Pictures in class folders, as ``ImageFolder`` has them."""

    def __init__(self, job: Job, *, with_pil: bool) -> None:
        """Lists the files."""
        self._paths = sorted(map(str, job.photos.rglob("*.jpg")))
        self._crops = Crops(job)
        self._with_pil = with_pil

    def __len__(self) -> int:
        """Returns the number of pictures."""
        return len(self._paths)

    def __getitem__(self, at: int) -> list[Tensor]:
        """Returns a picture's views."""
        if self._with_pil:
            with Image.open(self._paths[at]) as image:
                return self._crops(image.convert("RGB"))
        return self._crops(decode_image(read_file(self._paths[at]), ImageReadMode.RGB))


def data_loader(job: Job, *, with_pil: bool) -> Run:
    """Runs PyTorch's DataLoader on files; each worker makes whole batches."""
    files = Files(job, with_pil=with_pil)
    sampler = RandomSampler(files, num_samples=ENDLESS)
    return Run(iter(DataLoader(files, BATCH, sampler=sampler, num_workers=job.workers, persistent_workers=True)))


def webdataset(job: Job, *, with_pil: bool) -> Run:
    """Runs webdataset on tars: ``decode("pil")`` is what its documentation does, torchvision's decoder is faster."""
    import webdataset as wds
    from torch.utils.data import default_collate

    crops = Crops(job)

    def from_bytes(data: bytes) -> list[Tensor]:
        return crops(decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB))

    samples = wds.WebDataset(job.tar_files(), resampled=True, shardshuffle=False).shuffle(1000)
    if with_pil:
        samples = samples.decode("pil").to_tuple("jpg").map_tuple(crops)
    else:
        samples = samples.to_tuple("jpg").map_tuple(from_bytes)
    batches = samples.batched(BATCH, collation_fn=default_collate, partial=False)
    loader = wds.WebLoader(batches, batch_size=None, num_workers=job.workers, persistent_workers=True)
    return Run(views for (views,) in loader)


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """A row of the table."""

    label: str
    """On the page."""
    start: Callable[[Job], Run]
    """Returns it at work."""


PEERS = {
    "threads-tar": Peer(label="ours, `threads`, tar", start=lambda job: ours(job, executor="threads", folder=job.tars)),
    "threads-beton": Peer(
        label="ours, `threads`, beton", start=lambda job: ours(job, executor="threads", folder=job.beton)
    ),
    "dali-tar": Peer(label="ours, `dali`, tar", start=lambda job: ours(job, executor="dali", folder=job.tars)),
    "dali-drawing": Peer(label="DALI, graph like ours, draws itself", start=lambda job: dali(job, like_ours=True)),
    "dali": Peer(label="DALI, as documented", start=lambda job: dali(job, like_ours=False)),
    "spdl-torchvision": Peer(label="SPDL, torchvision's functions", start=lambda job: spdl(job, with_torchvision=True)),
    "spdl": Peer(label="SPDL, spdl.io", start=lambda job: spdl(job, with_torchvision=False)),
    "ffcv": Peer(label="ffcv", start=lambda job: ffcv(job, decode_once=False)),
    "ffcv-once": Peer(label="ffcv, decoding once (one size only)", start=lambda job: ffcv(job, decode_once=True)),
    "webdataset": Peer(label="webdataset, torchvision decodes", start=lambda job: webdataset(job, with_pil=False)),
    "webdataset-pil": Peer(label="webdataset, PIL", start=lambda job: webdataset(job, with_pil=True)),
    "torchvision": Peer(label="DataLoader, torchvision v2", start=lambda job: data_loader(job, with_pil=False)),
    "pil": Peer(label="DataLoader, PIL", start=lambda job: data_loader(job, with_pil=True)),
}
"""In the table's order; a peer's name on the command line → it."""
OURS = ("threads-tar", "threads-beton", "dali-tar")
