"""Who this process is among the ranks: from torchrun, from Slurm, or by hand; and the environment that GPUs want.

Neither torch nor Megatron is imported here, since both read the environment when they are.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re

from engine.errors import UserError

_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_BLACKWELL = 10  # major compute capability


def world_size() -> int:
    """The number of processes that were started together, 1 without a launcher."""
    return _number("WORLD_SIZE", 1)


def rank() -> int:
    """This process's place among them, from 0."""
    return _number("RANK", 0)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else default  # ``adopt`` refuses anything else


def one_agent() -> bool:
    """Whether one torchrun agent started all ranks: it ends the others when one has failed."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")


def node() -> str:
    """What tells nodes apart, two of torchrun's on one machine included."""
    import socket

    return f"{socket.gethostname()}/{os.environ.get('GROUP_RANK', os.environ.get('SLURM_NODEID', ''))}"


def adopt() -> None:
    """Checks the launcher's variables, and fills them in from Slurm's where ``srun`` started the ranks itself.

    Raises ``UserError`` for variables that are missing or contradict each other.
    """
    _adopt_slurm()
    present = [name for name in _NEEDED if name in os.environ]
    if not {"RANK", "WORLD_SIZE"} & set(present) or os.environ.get("WORLD_SIZE") == "1":
        return
    missing = [name for name in _NEEDED if not os.environ.get(name)]
    way_out = "Start the ranks with torchrun, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT"
    if missing:
        raise UserError(f"is not set, but {present[0]} is {os.environ[present[0]]}", where=missing[0], fix=way_out)
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        if not re.fullmatch(r"\d{1,9}", os.environ[name]):
            raise UserError(f"is {os.environ[name]!r}, expected a whole number", where=name, fix=way_out)
    if rank() >= world_size():
        raise UserError(f"is {rank()}, but WORLD_SIZE is {world_size()}", where="RANK", fix=way_out)


def _adopt_slurm() -> None:
    """``srun python engine/pretrain.py``: a step of several tasks, and no torchrun in between.

    SLURM_STEP_NUM_TASKS counts this step's tasks, where SLURM_NTASKS may be the whole job's: a single Python in an
    interactive allocation stays a single rank.
    """
    env = os.environ
    tasks = env.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in env or "WORLD_SIZE" in env or "SLURM_STEP_ID" not in env or not tasks.isdigit() or int(tasks) < 2:
        return
    env["RANK"], env["WORLD_SIZE"] = env.get("SLURM_PROCID", ""), tasks
    env.setdefault("LOCAL_RANK", env.get("SLURM_LOCALID", "0"))
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
    env.setdefault("MASTER_ADDR", first_host(nodes))
    job = int(re.sub(r"\D", "", env.get("SLURM_JOB_ID", "")) or 0) + int(re.sub(r"\D", "", env["SLURM_STEP_ID"]) or 0)
    env.setdefault("MASTER_PORT", str(20000 + job % 12000))  # below the ports that the kernel gives to clients


def first_host(nodes: str) -> str:
    """The first name of a Slurm node list: ``gpu[003-010,12],cpu1`` -> ``gpu003``."""
    found = re.match(r"([^,\[]*)(?:\[([^\]\-,]+)[^\]]*\]([^,\[]*))?", nodes)
    return "".join(part or "" for part in found.groups()) if found else ""


def set_gpu_environment(*, tensor: int, context: int, device: str) -> None:
    """What Megatron-core and NCCL want of the environment, before any CUDA context exists; what the user set stays.

    ``CUDA_DEVICE_MAX_CONNECTIONS``: up to Hopper, 1 where tensor or context ranks communicate, so that the GPU starts
    a collective before the matrix product it overlaps with, in the order in which they were queued (Megatron's
    arguments.py refuses anything else). From Blackwell on that order is no longer needed and would only serialise
    streams; 32 there, as NeMo's and Megatron-Bridge's performance settings have it. Elsewhere CUDA's default of 8.
    ``PYTORCH_CUDA_ALLOC_CONF``: segments that grow, against fragmentation when sequence lengths or batches change.
    """
    if device in ("cpu", "mps"):
        return
    if tensor > 1 or context > 1:
        connections = "32" if (compute_capability() or 0) >= _BLACKWELL else "1"
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", connections)
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def compute_capability() -> int | None:
    """The major compute capability of the first GPU, by NVML, which creates no CUDA context; None without a GPU."""
    with contextlib.suppress(OSError, AttributeError):
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit_v2() == 0:
            device, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
            if (nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device)) == 0
                    and nvml.nvmlDeviceGetCudaComputeCapability(device, ctypes.byref(major), ctypes.byref(minor)) == 0):
                return major.value
    return None
