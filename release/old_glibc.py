"""Print the linker's option for a library that is to run with an older glibc than this machine's.

    LDFLAGS="$(python release/old_glibc.py 2.28 build/glibc)" python -m build

The folder gets libraries of nothing but the symbols that this glibc had, in their versions then.
Zig makes them, which has the lists for every glibc. Compiler and linker stay those of the machine.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


def main(version: str, folder: Path) -> None:
    """Fill the folder and print the option."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as cache:
        source = Path(cache, "empty.c")
        source.touch()
        target = f"{platform.machine()}-linux-gnu.{version}"
        command = [sys.executable, "-m", "ziglang", "cc", "-target", target, "-shared"]
        subprocess.run(
            [*command, "-o", f"{cache}/empty.so", source],
            env=os.environ | {"ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache},
            check=True,
        )
        for library in Path(cache).glob("o/*/lib*.so.*"):
            shutil.copy(library, folder / f"{library.name.partition('.')[0]}.so")
    # As glibc's own libc.so: some functions are linked into every library.
    (folder / "libc.so").rename(folder / "libc-symbols.so")
    script = "GROUP(libc-symbols.so libc_nonshared.a AS_NEEDED(libld.so))\n"
    (folder / "libc.so").write_text(script)
    print(f"-L{folder.resolve()}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
