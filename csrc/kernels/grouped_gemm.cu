// From the products' parameters to the kernel that select.h names.

#include "grouped_gemm.h"

#include "hopper.h"
#include "simt/instances.h"
#include "sm80/instances.h"
#include "sm90/select.h"
#include "tile_scheduler.h"

namespace scattermoe::kernels {

namespace {

bool stride_aligned(int64_t stride, DType dtype) {
    return stride * size_of(dtype) % kVectorBytes == 0;
}

// The copies of the tensor-core kernels multiply row numbers by a stride of 32 bits.
bool stride_fits(int64_t stride, DType dtype) {
    return stride * size_of(dtype) <= kMaxRowBytes;
}

// Whether blocks have to ask for tiles: the first two of each are its own (sm90/tile_queue.h), or of each pair.
// `tiles`: how many there would be of the smallest.
bool asks_for_tiles(int64_t tiles) {
    DeviceFacts device;
    return current_device(device) == cudaSuccess && tiles > device.multiprocessors;
}
constexpr int kSmallestTile = 128;

}  // namespace

bool counts_tiles(const GroupedGemmParams& p) {
    return sm90::deals_tiles(p.k) && takes_hopper(p) &&
           asks_for_tiles(max_row_tiles(p.num_slots, p.num_experts, kSmallestTile) * ceil_div(p.n, kSmallestTile));
}

bool counts_tiles(const WeightGradParams& p) {
    return takes_hopper(p) &&
           asks_for_tiles(int64_t{p.num_experts} * ceil_div(p.m, kSmallestTile) * ceil_div(p.n, kSmallestTile));
}

cudaError_t grouped_gemm(const GroupedGemmParams& p, cudaStream_t stream) {
    if (p.num_slots == 0 || p.n == 0) return cudaSuccess;
    if (p.weight_k_stride != 1 && p.weight_n_stride != 1) return cudaErrorInvalidValue;
    const int64_t row_stride = p.weight_k_stride == 1 ? p.weight_n_stride : p.weight_k_stride;
    const bool aligned = is_vector_aligned(p.in) && is_vector_aligned(p.weight) &&
                         stride_aligned(p.in_stride, p.dtype) && stride_aligned(p.weight_expert_stride, p.dtype) &&
                         stride_aligned(row_stride, p.dtype);
    if (!stride_fits(p.in_stride, p.dtype) || !stride_fits(row_stride, p.dtype)) return cudaErrorInvalidValue;
#if defined(SCATTERMOE_SM90)
    if (takes_hopper(p)) return sm90::grouped_gemm(p, stream);
#endif
    DeviceFacts device;
    const cudaError_t error = current_device(device);
    if (error != cudaSuccess) return error;
    const GemmChoice choice = select_gemm(gemm_query(p, device.code_architecture, aligned, /*hopper=*/false));
    if (choice.engine == GemmEngine::kSimt) {
        return p.dtype == DType::kFloat64 ? simt::grouped_gemm_fp64(p, stream) : simt::grouped_gemm_fp32(p, stream);
    }
    switch (p.dtype) {
        case DType::kBFloat16:
            return sm80::grouped_gemm_bf16(p, choice, stream);
        case DType::kFloat16:
            return sm80::grouped_gemm_fp16(p, choice, stream);
        default:
            return sm80::grouped_gemm_tf32(p, choice, stream);
    }
}

bool combines_beside(const WeightGradParams& p) {
    return sm90::combines_beside(sm90::gathered_side(p)) && takes_hopper(p);
}

cudaError_t weight_grad(const WeightGradParams& p, cudaStream_t stream) {
    if (p.beside != nullptr &&
        !(p.beside->dtype == p.dtype && is_plain_sum(*p.beside) && has_aligned_rows(*p.beside) && combines_beside(p))) {
        const cudaError_t error = combine(*p.beside, stream);
        if (error != cudaSuccess) return error;
        WeightGradParams alone = p;
        alone.beside = nullptr;
        return weight_grad(alone, stream);
    }
    if (p.num_experts == 0 || p.m == 0 || p.n == 0) return cudaSuccess;
    const bool aligned = is_vector_aligned(p.left) && is_vector_aligned(p.right) &&
                         stride_aligned(p.left_stride, p.dtype) && stride_aligned(p.right_stride, p.dtype);
    if (!stride_fits(p.left_stride, p.dtype) || !stride_fits(p.right_stride, p.dtype)) return cudaErrorInvalidValue;
#if defined(SCATTERMOE_SM90)
    if (takes_hopper(p)) return sm90::weight_grad(p, stream);
#endif
    DeviceFacts device;
    const cudaError_t error = current_device(device);
    if (error != cudaSuccess) return error;
    const GemmChoice choice = select_gemm(gemm_query(p, device.code_architecture, aligned, /*hopper=*/false));
    if (choice.engine == GemmEngine::kSimt) {
        return p.dtype == DType::kFloat64 ? simt::weight_grad_fp64(p, stream) : simt::weight_grad_fp32(p, stream);
    }
    switch (p.dtype) {
        case DType::kBFloat16:
            return sm80::weight_grad_bf16(p, choice, stream);
        case DType::kFloat16:
            return sm80::weight_grad_fp16(p, choice, stream);
        default:
            return sm80::weight_grad_tf32(p, choice, stream);
    }
}

}  // namespace scattermoe::kernels
