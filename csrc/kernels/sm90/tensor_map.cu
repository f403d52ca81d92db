#include "tensor_map.h"

namespace scattermoe::kernels::sm90 {

namespace {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// By way of the runtime, so that nothing is linked against the driver's library, which a machine without a GPU lacks.
EncodeTiled find_encode_tiled() {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    constexpr unsigned kCuda12 = 12000;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, kCuda12, cudaEnableDefault, &found) !=
            cudaSuccess ||
        found != cudaDriverEntryPointSuccess) {
        return nullptr;
    }
    return reinterpret_cast<EncodeTiled>(function);
}

constexpr int kMaxRank = 5;

}  // namespace

cudaError_t make_tensor_map(CUtensorMap& map, DType dtype, const void* data, int rank, const int64_t* sizes,
                            const int64_t* strides, const int* box) {
    static const EncodeTiled encode = find_encode_tiled();
    if (encode == nullptr) return cudaErrorNotSupported;
    if (size_of(dtype) != 2 || rank > kMaxRank) return cudaErrorInvalidValue;
    cuuint64_t map_sizes[kMaxRank], map_strides[kMaxRank];
    cuuint32_t map_box[kMaxRank], element_strides[kMaxRank];
    for (int i = 0; i < rank; ++i) {
        map_sizes[i] = static_cast<cuuint64_t>(sizes[i]);
        map_box[i] = static_cast<cuuint32_t>(box[i]);
        element_strides[i] = 1;
        if (i > 0) map_strides[i - 1] = static_cast<cuuint64_t>(strides[i - 1] * size_of(dtype));
    }
    const auto encode_map = [&] {
        return encode(
            &map, dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            static_cast<cuuint32_t>(rank), const_cast<void*>(data), map_sizes, map_strides, map_box, element_strides,
            CU_TENSOR_MAP_INTERLEAVE_NONE, box[0] == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
            CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    };
    if (encode_map() == CUDA_SUCCESS) return cudaSuccess;
    // The driver wants the thread to have a context, which the runtime gives it with the first call that needs one: a
    // thread of autograd may not have made any.
    const cudaError_t error = cudaFree(nullptr);
    if (error != cudaSuccess) return error;
    return encode_map() == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace scattermoe::kernels::sm90
