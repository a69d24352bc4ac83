"""Peers of ``data_path.py`` that run graphs and pipelines of their own: ffcv, DALI, SPDL."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data_path_job import BATCH, ENDLESS, RATIO, Crops, Job, Run
from torchvision.io import ImageReadMode, decode_image, read_file
from torchvision.transforms import v2

# ------------------------------------------------------------------------------------------------------------- ffcv


def ffcv(job: Job, *, decode_once: bool) -> Run:
    """Runs ffcv's loader on our shard, without ``NormalizeImage``: today's numba never finishes compiling it.

    Its resize is OpenCV's INTER_AREA.  Its decoder crops, so each view decodes the picture again; ``decode_once`` is
    ``SimpleRGBImageDecoder`` shared by all views, which refuses pictures that are not all of one size, as ImageNet's.
    """
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline.pipeline_spec import PipelineSpec
    from ffcv.transforms import RandomHorizontalFlip, RandomResizedCrop, ToTensor, ToTorchImage

    (path,) = job.beton.glob("*.beton")
    shared = SimpleRGBImageDecoder()
    pipelines: dict[str, Any] = {"label": None}
    if decode_once:
        pipelines["image"] = PipelineSpec("image", shared, [])
    for number, (size, scale) in enumerate(job.views):
        after = [RandomHorizontalFlip(), ToTensor(), ToTorchImage()]
        if decode_once:
            pipelines[f"view{number}"] = PipelineSpec(shared, None, [RandomResizedCrop(scale, RATIO, size), *after])
        else:
            decoder = RandomResizedCropRGBImageDecoder((size, size), scale, RATIO)
            pipelines[f"view{number}" if number else "image"] = PipelineSpec("image", decoder, after)
    num_samples = Loader(str(path), BATCH, num_workers=1, pipelines={"image": None}).reader.num_samples
    loader = Loader(
        str(path),
        BATCH,
        num_workers=job.workers,
        os_cache=True,
        order=OrderOption.RANDOM,
        indices=np.tile(np.arange(num_samples, dtype=np.uint64), ENDLESS // 10 // num_samples),
        pipelines=pipelines,
    )
    return Run(list(batch)[decode_once:] for batch in loader)


# ------------------------------------------------------------------------------------------------------------- DALI


def dali(job: Job, *, like_ours: bool) -> Run:
    """Runs a graph of DALI's own that draws its crops and flips, with DALI's reader.

    Of a single view only the window is decoded.  Otherwise it is written as DALI's documentation would;
    ``like_ours`` has our graph's operators instead (cut, resize, mirrored by the resize): what it gains over ours is
    what a planned order, planned views and checks cost.
    """
    from nvidia.dali import fn
    from nvidia.dali.pipeline import pipeline_def
    from nvidia.dali.types import DALIInterpType
    from torch.utils.dlpack import from_dlpack

    tars = job.tar_files()
    is_single = len(job.views) == 1
    linear: dict[str, Any] = {"interp_type": DALIInterpType.INTERP_LINEAR, "antialias": True}
    decoding: dict[str, Any] = {"adjust_orientation": False, "jpeg_fancy_upsampling": True}

    def as_ours(encoded: Any, pictures: Any, size: int, area: list[float]) -> Any:
        start, shape = fn.random_crop_generator(
            fn.peek_image_shape(encoded, adjust_orientation=False), random_area=area, random_aspect_ratio=list(RATIO)
        )
        if is_single:
            window = fn.decoders.image_slice(encoded, start, shape, axes=[0, 1], **decoding)
        else:
            window = fn.slice(pictures, start, shape, axes=[0, 1])
        left = fn.cast(fn.random.coin_flip(), dtype=_float_type())
        zero_one: dict[str, Any] = {
            "roi_start": fn.stack(0.0, left),
            "roi_end": fn.stack(1.0, 1.0 - left),
            "roi_relative": True,
        }
        return fn.resize(window, size=[size, size], **zero_one, **linear)

    def as_documented(encoded: Any, pictures: Any, size: int, area: list[float]) -> Any:
        drawn: dict[str, Any] = {"random_area": area, "random_aspect_ratio": list(RATIO)}
        if is_single:
            view = fn.resize(fn.decoders.image_random_crop(encoded, **drawn, **decoding), size=[size, size], **linear)
        else:
            view = fn.random_resized_crop(pictures, size=[size, size], **drawn, **linear)
        return fn.flip(view, horizontal=fn.random.coin_flip())

    @pipeline_def
    def graph() -> tuple[Any, ...]:
        indices = [str(Path(path).with_suffix(".idx")) for path in tars]
        encoded = fn.readers.webdataset(paths=tars, index_paths=indices, ext=["jpg"], random_shuffle=True)
        pictures = None if is_single else fn.decoders.image(encoded, **decoding)
        make = as_ours if like_ours else as_documented
        return tuple(make(encoded, pictures, size, list(area)) for size, area in job.views)

    pipeline = graph(batch_size=BATCH, num_threads=job.workers, device_id=None, seed=0)
    pipeline.build()

    def batches() -> Iterator[list[Any]]:
        while True:
            yield [from_dlpack(output.as_tensor()) for output in pipeline.run()]

    return Run(batches())


def _float_type() -> Any:
    from nvidia.dali.types import DALIDataType

    return DALIDataType.FLOAT


# ------------------------------------------------------------------------------------------------------------- SPDL


def spdl(job: Job, *, with_torchvision: bool) -> Run:
    """Runs a pipeline of SPDL's threads on files, decoded by its own ``spdl.io`` or by torchvision's functions.

    ``spdl.io`` is FFmpeg: its own JPEG decoder, windows cut from YCbCr, and swscale's bilinear, which widens when
    shrinking, as an antialiased one does.  The picture is decoded once and split over the views' filters.
    """
    import spdl.io
    from spdl.pipeline import PipelineBuilder

    torch.set_num_threads(1)  # of an operator: threads work on pictures
    paths = sorted(map(str, job.photos.rglob("*.jpg")))
    crops = Crops(job)

    def endless() -> Iterator[str]:
        while True:
            yield from random.sample(paths, len(paths))

    def by_torchvision(path: str) -> list[Any]:
        return crops(decode_image(read_file(path), ImageReadMode.RGB))

    def by_ffmpeg(path: str) -> list[Any]:
        packets = spdl.io.demux_image(path)
        width, height = packets.codec.width, packets.codec.height
        chains = [_filter_chain(width, height, size, scale) for size, scale in job.views]
        if len(chains) == 1:
            return [spdl.io.decode_packets(packets, filter_desc=chains[0])]
        pads = range(len(chains))
        description = (
            f"{spdl.io.get_buffer_desc(packets.codec)},split={len(chains)}"
            + "".join(f"[in{pad}]" for pad in pads)
            + "".join(f";[in{pad}]{chains[pad]},buffersink@out{pad}" for pad in pads)
        )
        filters = spdl.io.FilterGraph(description)
        filters.add_frames(spdl.io.decode_packets(packets, filter_desc=None))
        filters.flush()
        return [filters.get_frames(key=f"buffersink@out{pad}") for pad in pads]

    def collate(samples: list[list[Any]]) -> list[Any]:
        views = zip(*samples, strict=True)
        if with_torchvision:
            return [torch.stack(view) for view in views]
        return [spdl.io.to_torch(spdl.io.convert_frames(list(view))) for view in views]

    pipeline = (
        PipelineBuilder()
        .add_source(endless())
        .pipe(by_torchvision if with_torchvision else by_ffmpeg, concurrency=job.workers)
        .aggregate(BATCH)
        .pipe(collate)
        .add_sink(2)
        .build(num_threads=job.workers)
    )

    def batches() -> Iterator[list[Any]]:
        with pipeline.auto_stop():
            yield from pipeline

    return Run(batches())


def _filter_chain(width: int, height: int, size: int, scale: tuple[float, float]) -> str:
    """Returns FFmpeg's filters that make a random view."""
    top, left, rows, columns = (
        v2.RandomResizedCrop(size, scale=scale, ratio=RATIO)
        .make_params([torch.empty(3, height, width, device="meta")])
        .values()
    )
    flip = "hflip," * (random.random() < 0.5)
    cut = f"crop={columns}:{rows}:{left}:{top}:exact=1"
    return f"{cut},scale={size}:{size}:flags=bilinear,{flip}format=pix_fmts=rgb24"
