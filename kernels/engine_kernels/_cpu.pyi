"""csrc/cpu/bindings.cpp. Arguments are addresses (Tensor.data_ptr()), sizes, strides in elements, a dtype code
(0 fp32, 1 bf16) and a number of threads."""

def instruction_set() -> str: ...
def use_instruction_set(name: str) -> bool: ...
def attention_workspace(dtype: int, s: int, t: int, d: int, backward: bool, /) -> int: ...
def attention_fwd(
    dtype: int, q_k_v_dout_sinks_segments: list[int], out: int, lse: int, workspace: int, bytes_a_thread: int,
    sizes: list[int], strides: list[int], scale: float, threads: int, /,
) -> None: ...
def attention_bwd(
    dtype: int, q_k_v_dout_sinks_segments: list[int], out: int, lse: int, dq_dk_dv: list[int], workspace: int,
    bytes_a_thread: int, sizes: list[int], strides: list[int], scale: float, threads: int, /,
) -> None: ...
def rms_norm_fwd(
    dtype: int, x: int, residual: int, w: int, y: int, total: int, rstd: int,
    n: int, d: int, x_stride: int, residual_stride: int, eps: float, offset: float, threads: int, /,
) -> None: ...
def rms_norm_bwd(
    dtype: int, x: int, dy: int, dtotal: int, w: int, rstd: int, dx: int, dw_partial: int,
    n: int, d: int, x_stride: int, dy_stride: int, dtotal_stride: int, offset: float, threads: int, /,
) -> None: ...
def split_rotary(
    forward: bool, dtype: int, mixed: int, q: int, k: int, v: int, cos: int, sin: int,
    sizes: list[int], strides: list[int], threads: int, /,
) -> None: ...
def swiglu_fwd(
    dtype: int, x: int, weights: int, y: int, n: int, f: int, x_stride: int,
    clamped: bool, alpha: float, limit: float, threads: int, /,
) -> None: ...
def swiglu_bwd(
    dtype: int, x: int, dy: int, weights: int, dx: int, dweights: int, n: int, f: int, x_stride: int, dy_stride: int,
    clamped: bool, alpha: float, limit: float, threads: int, /,
) -> None: ...
def cross_entropy_stats(
    dtype: int, logits: int, labels: int, stats: int, n: int, v: int, valid: int, stride: int, vocab_start: int,
    logit_sum: bool, entropy: bool, threads: int, /,
) -> None: ...
def cross_entropy_grad(
    dtype: int, logits: int, labels: int, max: int, sum_exp: int, weight: int,
    n: int, v: int, valid: int, stride: int, vocab_start: int, on_label: float, elsewhere: float, z_loss: float,
    threads: int, /,
) -> None: ...
