"""Conversion against its peers on the same images: ``python benchmarks/convert_shards.py PHOTOS SCRATCH``.

PHOTOS is a folder as ``tools/write_photos.py`` writes it.  SCRATCH is best in memory (``/dev/shm``): what is compared
are programs, not disks, and only ours waits for the disk.  Each image is converted ``--repeat`` times, so that a run
takes seconds.  All runs of a round follow one another, and medians over rounds are printed as Markdown.

Peers: webdataset's ``TarWriter`` in a bare loop that reads the files and writes them; ``simplejpeg`` (libjpeg-turbo)
decoding to RGB in two processes; ffcv's ``DatasetWriter`` with two workers.
"""

import argparse
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROUNDS = 5


def copied(photos: Path, folder: Path, copies: int) -> Path:
    """Copies each image of class folders so many times, and returns the folder."""
    for path in sorted(photos.rglob("*.jpg")):
        (folder / path.parent.name).mkdir(parents=True, exist_ok=True)
        for copy in range(copies):
            shutil.copy(path, folder / path.parent.name / f"{path.stem}_{copy}.jpg")
    return folder


def convert(photos: Path, out: Path, *options: str) -> float:
    """Returns the seconds that ``maestri shards convert`` takes, its start included."""
    shutil.rmtree(out, ignore_errors=True)
    command = [Path(sys.executable).with_name("maestri"), "shards", "convert", photos, out, "--json", *options]
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def peak_memory(photos: Path, out: Path, *options: str) -> float:
    """Returns the largest memory of a conversion's processes together, in MB: their proportional set sizes."""
    shutil.rmtree(out, ignore_errors=True)
    command = [Path(sys.executable).with_name("maestri"), "shards", "convert", photos, out, "--json", *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, sum(map(proportional_size, members(process.pid))))
        time.sleep(0.02)
    assert process.returncode == 0
    return peak


def members(session: int) -> list[Path]:
    """Returns the /proc folders of a session's processes."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if int((path / "stat").read_text().rpartition(")")[2].split()[3]) == session:
                found.append(path)
        except (OSError, IndexError):
            continue  # it has just ended
    return found


def proportional_size(process: Path) -> float:
    """Returns a process's memory in MB, what it shares with others divided among them."""
    try:
        lines = (process / "smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1000


def bare_tar_writer(photos: Path, out: Path) -> float:
    """Returns the seconds of a loop around webdataset's writer, in this process."""
    import webdataset

    files = sorted(photos.rglob("*.jpg"))
    labels = {name: number for number, name in enumerate(sorted(path.name for path in photos.iterdir()))}
    start = time.perf_counter()
    with webdataset.TarWriter(str(out)) as writer:
        for path in files:
            key = f"{path.parent.name}/{path.stem}"
            writer.write({"__key__": key, "jpg": path.read_bytes(), "cls": labels[path.parent.name]})
    return time.perf_counter() - start


def decode_all(files: list[Path]) -> None:
    """Decodes files to RGB."""
    import simplejpeg

    for path in files:
        simplejpeg.decode_jpeg(path.read_bytes())


def decode_only(photos: Path, count: int) -> float:
    """Returns the seconds of so many processes that read and decode all files."""
    files = sorted(photos.rglob("*.jpg"))
    processes = [multiprocessing.Process(target=decode_all, args=(files[part::count],)) for part in range(count)]
    start = time.perf_counter()
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert not any(process.exitcode for process in processes)
    return time.perf_counter() - start


FFCV = """
import sys
from pathlib import Path
from ffcv.fields import IntField, RGBImageField
from ffcv.writer import DatasetWriter
from PIL import Image
photos, out = Path(sys.argv[1]), sys.argv[2]
files = sorted(photos.rglob("*.jpg"))
class Images:
    def __len__(self): return len(files)
    def __getitem__(self, at): return Image.open(files[at]), int(files[at].parent.name.rpartition("_")[2])
fields = {"image": RGBImageField(write_mode="jpg"), "label": IntField()}
DatasetWriter(out, fields, num_workers=2).from_indexed_dataset(Images())
"""


def ffcv_writer(photos: Path, out: Path) -> float:
    """Returns the seconds of ffcv's writer, its start included."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", FFCV, photos, out], check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("photos", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--rows", default="", help="only rows with these words, such as 'decode' or '1 '")
    options = parser.parse_args()
    scratch: Path = options.scratch / "convert_shards"
    shutil.rmtree(scratch, ignore_errors=True)
    few, many = copied(options.photos, scratch / "few", 1), copied(options.photos, scratch / "many", options.repeat)
    files = sorted(options.photos.rglob("*.jpg"))
    out = scratch / "out"
    header = ("--check", "header", "--no-check-space")

    def ours(*words: str) -> Callable[[Path], float]:
        return lambda photos: convert(photos, out, *words)

    runs: dict[str, tuple[Path, Callable[[Path], float]]] = {
        "bare TarWriter": (many, lambda photos: bare_tar_writer(photos, scratch / "bare.tar")),
        "tar, header, 1 worker": (many, ours(*header, "--workers", "1")),
        "tar, header, 2 workers": (many, ours(*header, "--workers", "2")),
        "decode only, 1 process": (many, lambda photos: decode_only(photos, 1)),
        "tar, decode, 1 worker": (many, ours("--workers", "1")),
        "decode only, 2 processes": (many, lambda photos: decode_only(photos, 2)),
        "tar, decode, 2 workers": (many, ours("--workers", "2")),
        "both, decode, 2 workers": (many, ours("--workers", "2", "--format", "both")),
        "ffcv writer, 2 workers": (few, lambda photos: ffcv_writer(photos, scratch / "ffcv.beton")),
        "beton, header, 2 workers": (few, ours(*header, "--workers", "2", "--format", "beton")),
        "beton, header, 2 workers, all": (many, ours(*header, "--workers", "2", "--format", "beton")),
    }
    runs = {name: run for name, run in runs.items() if options.rows in name}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(options.rounds):
        for name, (photos, run) in runs.items():
            seconds[name].append(run(photos))
            print(f"round {number + 1}: {name} {seconds[name][-1]:.2f} s", file=sys.stderr)
    count = {few: len(files), many: len(files) * options.repeat}
    rates = {name: count[runs[name][0]] / statistics.median(values) for name, values in seconds.items()}
    size = sum(path.stat().st_size for path in files) / len(files) / 1000
    print(f"{len(files)} images of {size:.0f} KB, {options.repeat} times; {options.rounds} rounds; medians\n")
    print("| what | images | images/s | seconds, each round |\n|---|---:|---:|---|")
    for name, values in seconds.items():
        listed = ", ".join(f"{value:.2f}" for value in values)
        print(f"| {name} | {count[runs[name][0]]:,} | {rates[name]:,.0f} | {listed} |")
    print("\n| ratio | aim | found |\n|---|---|---:|")
    for over, under, aim in (
        ("tar, header, 1 worker", "bare TarWriter", "≥ 0.8"),
        ("tar, header, 2 workers", "bare TarWriter", "≥ 1.3"),
        ("tar, decode, 1 worker", "decode only, 1 process", "≥ 0.85"),
        ("tar, decode, 2 workers", "decode only, 2 processes", "≥ 0.85"),
        ("tar, decode, 2 workers", "both, decode, 2 workers", "≤ 1.3"),
        ("beton, header, 2 workers", "ffcv writer, 2 workers", "≥ 6"),
        ("beton, header, 2 workers, all", "ffcv writer, 2 workers", "≥ 6"),
    ):
        if {over, under} <= rates.keys():
            print(f"| {over} / {under} | {aim} | {rates[over] / rates[under]:.2f} |")
    if not options.rows:
        print("\n| images | peak memory of all processes, MB |\n|---:|---:|")
    for photos in (few, many) if not options.rows else ():
        print(f"| {count[photos]:,} | {peak_memory(photos, out, '--workers', '2'):,.0f} |")
    shutil.rmtree(scratch)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
