#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <array>
#include <cstdint>

#include "../types.h"

namespace scattermoe::kernels::sm90 {

// A matrix or stack of matrices as the copy engine moves it, fastest dimension first. Strides, of all dimensions but
// the first, are in elements; box: what one copy moves.
template <int kRank>
struct TensorLayout {
    std::array<int64_t, kRank> sizes;
    std::array<int64_t, kRank - 1> strides;
    std::array<int, kRank> box;
};

// For 16-bit elements. A box is as wide as the swizzle of its rows in shared memory, 64 or 128 bytes.
cudaError_t make_tensor_map(CUtensorMap& map, DType dtype, const void* data, int rank, const int64_t* sizes,
                            const int64_t* strides, const int* box);

template <int kRank>
cudaError_t make_tensor_map(CUtensorMap& map, DType dtype, const void* data, const TensorLayout<kRank>& layout) {
    return make_tensor_map(map, dtype, data, kRank, layout.sizes.data(), layout.strides.data(), layout.box.data());
}

}  // namespace scattermoe::kernels::sm90
