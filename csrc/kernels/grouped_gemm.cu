// From the products' parameters to the kernel that select.h names.

#include "grouped_gemm.h"

#include "device.h"
#include "select.h"
#include "simt/instances.h"
#include "sm80/instances.h"
#include "sm90/select.h"
#if defined(SCATTERMOE_SM90)
#include "sm90/sm90.h"
#endif

namespace scattermoe::kernels {

namespace {

bool stride_aligned(int64_t stride, DType dtype) {
    return stride * size_of(dtype) % kVectorBytes == 0;
}

// The copies of the tensor-core kernels multiply row numbers by a stride of 32 bits.
bool stride_fits(int64_t stride, DType dtype) {
    return stride * size_of(dtype) <= kMaxRowBytes;
}

// Whether the Hopper kernels are there and take these operands.
template <typename Params>
bool hopper_can_run([[maybe_unused]] const Params& p, [[maybe_unused]] int arch) {
#if defined(SCATTERMOE_SM90)
    return arch == 90 && sm90::is_enabled() && sm90::can_run(p);
#else
    return false;
#endif
}

template <typename Params>
cudaError_t choose(const Params& p, bool aligned, bool weight_gradient, GemmChoice& choice) {
    int arch = 0;
    const cudaError_t error = code_architecture(arch);
    choice = select_gemm({p.dtype, p.allow_tf32, arch, aligned, p.num_slots, p.num_experts, weight_gradient, p.n,
                          hopper_can_run(p, arch)});
    return error;
}

template <typename Params>
bool takes_hopper(const Params& p, bool weight_gradient) {
    GemmChoice choice;
    return choose(p, /*aligned=*/true, weight_gradient, choice) == cudaSuccess && choice.engine == GemmEngine::kHopper;
}

}  // namespace

bool counts_tiles(const GroupedGemmParams& p) {
    return sm90::deals_tiles(p.k) && takes_hopper(p, /*weight_gradient=*/false);
}

bool counts_tiles(const WeightGradParams& p) {
    return takes_hopper(p, /*weight_gradient=*/true);
}

cudaError_t grouped_gemm(const GroupedGemmParams& p, cudaStream_t stream) {
    if (p.num_slots == 0 || p.n == 0) return cudaSuccess;
    if (p.weight_k_stride != 1 && p.weight_n_stride != 1) return cudaErrorInvalidValue;
    const int64_t row_stride = p.weight_k_stride == 1 ? p.weight_n_stride : p.weight_k_stride;
    const bool aligned = is_vector_aligned(p.in) && is_vector_aligned(p.weight) &&
                         stride_aligned(p.in_stride, p.dtype) && stride_aligned(p.weight_expert_stride, p.dtype) &&
                         stride_aligned(row_stride, p.dtype);
    if (!stride_fits(p.in_stride, p.dtype) || !stride_fits(row_stride, p.dtype)) return cudaErrorInvalidValue;
    GemmChoice choice;
    const cudaError_t error = choose(p, aligned, false, choice);
    if (error != cudaSuccess) return error;
#if defined(SCATTERMOE_SM90)
    if (choice.engine == GemmEngine::kHopper) return sm90::grouped_gemm(p, stream);
#endif
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

cudaError_t weight_grad(const WeightGradParams& p, cudaStream_t stream) {
    if (p.num_experts == 0 || p.m == 0 || p.n == 0) return cudaSuccess;
    const bool aligned = is_vector_aligned(p.left) && is_vector_aligned(p.right) &&
                         stride_aligned(p.left_stride, p.dtype) && stride_aligned(p.right_stride, p.dtype);
    if (!stride_fits(p.left_stride, p.dtype) || !stride_fits(p.right_stride, p.dtype)) return cudaErrorInvalidValue;
    GemmChoice choice;
    const cudaError_t error = choose(p, aligned, true, choice);
    if (error != cudaSuccess) return error;
#if defined(SCATTERMOE_SM90)
    if (choice.engine == GemmEngine::kHopper) return sm90::weight_grad(p, stream);
#endif
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
