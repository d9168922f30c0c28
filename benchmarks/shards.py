"""What a store costs beside its images: stores of 10 to 10,000 shards of one pair each.

    python -m benchmarks.shards [--folder /dev/shm]

Prints seconds by the clock, and milliseconds of the process for a shard. A teacher of one cheap
call makes the images, so nearly all of it is claiming, writing, hashing and verifying.
"""

import argparse
import tempfile
import time

import ds


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shards")
    parser.add_argument("--folder", help="where the stores are made; by default for temporaries")
    parser.add_argument("--most", type=int, default=10_000, help="shards (%(default)s)")
    options = parser.parse_args()
    teacher = ds.analytic.Gaussian().teacher(ds.solvers.DDIM(), (800,))
    for count in (n for n in (10, 100, 1_000, 10_000) if n <= options.most):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            wall, process = time.perf_counter(), time.process_time()
            store = ds.generate_pairs(
                teacher, f"{folder}/store", count, shard_size=1, quantizer="float32"
            )
            store.verify()
            wall, process = time.perf_counter() - wall, time.process_time() - process
        print(f"{count:6} shards: {wall:6.2f} s, {1e3 * process / count:.2f} ms of a CPU each")


if __name__ == "__main__":
    main()
