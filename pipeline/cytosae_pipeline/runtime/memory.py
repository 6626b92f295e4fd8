"""Free memory, with the limits of containers and of the process taken into account."""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_PRIMITIVES = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
_N_PRIMITIVES = "32"


def limit_primitive_cache() -> None:
    """Limit how many matrix products of different shapes oneDNN keeps code for, unless the environment says it.

    torch computes bfloat16 products on a CPU with oneDNN, which compiles a product for each shape and keeps the last
    1,024 of them: hundreds of megabytes where sparse products have another shape in every step, none of which comes
    again. Compiling is not what takes time. oneDNN reads the limit at its first product, so that products made before
    this is called leave things as they are.
    """
    os.environ.setdefault(_PRIMITIVES, _N_PRIMITIVES)


def available_ram(root: Path = Path("/")) -> int | None:
    """Bytes that this process can allocate without swapping or being killed; None where the system does not say.

    Args:
        root: Folder that contains /proc and /sys.
    """
    found = [_machine(root), *_cgroups(root), *_own_limits(root)]
    known = [n_bytes for n_bytes in found if n_bytes is not None]
    return max(0, min(known)) if known else None


def _machine(root: Path) -> int | None:
    """Free memory of the machine, the page cache counted as free."""
    try:
        fields = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        try:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, OSError, ValueError):  # Windows has no sysconf, macOS not this name
            return None


def _cgroups(root: Path) -> Iterator[int | None]:
    """Free memory under the limits of this process's control groups, versions 2 and 1."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    base = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, place = line.split(":", 2)
        # A limit may be set at any level above, and inside a container the path shown may not exist.
        levels = [str(level).lstrip("/") for level in (PurePosixPath(place), *PurePosixPath(place).parents)]
        if not controllers:
            for level in levels:
                yield _cgroup(base / level, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            for level in levels:
                names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
                yield _cgroup(base / "memory" / level, *names)


def _cgroup(folder: Path, limit: str, usage: str, cache: str) -> int | None:
    """Free memory under the limit of one control group, its page cache counted as free; None without a limit."""
    try:
        statistics = dict(line.split(" ", 1) for line in (folder / "memory.stat").read_text().splitlines())
        used = int((folder / usage).read_text()) - int(statistics.get(cache, 0))
        return int((folder / limit).read_text()) - used
    except (OSError, ValueError):  # no such group, or a limit of `max`
        return None


def _own_limits(root: Path) -> Iterator[int | None]:
    """What the limits of this process (`ulimit -v`, `ulimit -d`) leave; None for those that are not set."""
    try:
        import resource

        n_pages = list(map(int, (root / "proc/self/statm").read_text().split()))
        page_bytes = resource.getpagesize()
        for limit, used in ((resource.RLIMIT_AS, n_pages[0]), (resource.RLIMIT_DATA, n_pages[5])):
            most, _ = resource.getrlimit(limit)
            yield None if most == resource.RLIM_INFINITY else most - used * page_bytes
    except (ImportError, AttributeError, OSError, ValueError, IndexError):  # not Linux
        return


def exceeds_page_cache(n_bytes: int) -> bool:
    """Whether so many bytes do not fit into free memory, so that reading past the system's cache is better."""
    ram = available_ram()
    return ram is not None and n_bytes > ram
