#pragma once

// From arguments to a running kernel. Included by the instances alone.

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "../dependent_launch.h"
#include "../device.h"
#include "../dispatch.h"
#include "epilogue.h"
#include "glu_backward_epilogue.h"
#include "grouped_gemm_kernel.h"
#include "instances.h"
#include "weight_grad_kernel.h"

namespace scattermoe::kernels::sm90 {

template <EpilogueId kEpilogue, typename Element, Tile kTile>
struct EpilogueOf;
template <typename Element, Tile kTile>
struct EpilogueOf<EpilogueId::kStore, Element, kTile> {
    using Type = StoreEpilogue<Element, kTile>;
};
template <typename Element, Tile kTile>
struct EpilogueOf<EpilogueId::kSwiglu, Element, kTile> {
    using Type = GluEpilogue<Element, kTile, Activation::kSwiglu>;
};

template <typename Element, Tile kTile>
struct EpilogueOf<EpilogueId::kSwigluBackward, Element, kTile> {
    using Type = GluBackwardEpilogue<Element, kTile, Activation::kSwiglu>;
};

// One block on every SM, or fewer where there are fewer tiles; `cluster` of them together, which a tile's number is
// for.
template <typename Arguments>
cudaError_t launch_persistent(void (*kernel)(Arguments), OncePerDevice& shared_allowed, int cluster, int threads,
                              int shared, int64_t tiles, const Arguments& arguments, cudaStream_t stream) {
    DeviceFacts device;
    cudaError_t error = current_device(device);
    if (error == cudaSuccess) {
        error = shared_allowed.run(device.device, [&] {
            return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
        });
    }
    if (error != cudaSuccess) return error;
    // Tile numbers run past the last by some grids.
    if (tiles > INT32_MAX - 4 * device.multiprocessors) return cudaErrorInvalidConfiguration;
    const int64_t clusters = std::clamp<int64_t>(tiles, 1, std::max(device.multiprocessors / cluster, 1));
    cudaLaunchAttribute attributes[2]{};
    unsigned count = set_dependent(attributes[0], device) ? 1 : 0;
    if (cluster > 1) {
        attributes[count].id = cudaLaunchAttributeClusterDimension;
        attributes[count++].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    }
    cudaLaunchConfig_t config{};
    config.gridDim = static_cast<unsigned>(clusters * cluster);
    config.blockDim = static_cast<unsigned>(threads);
    config.dynamicSmemBytes = static_cast<size_t>(shared);
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = count;
    return cudaLaunchKernelEx(&config, kernel, arguments);
}

template <typename F>
cudaError_t dispatch_half(DType dtype, F&& f) {
    if (dtype == DType::kBFloat16) return f(TypeTag<__nv_bfloat16>{});
    if (dtype == DType::kFloat16) return f(TypeTag<__half>{});
    return cudaErrorInvalidValue;
}

template <Tile kTile, Rows kRows, Major kWeightMajor, EpilogueId kEpilogue>
cudaError_t launch_grouped_gemm(DType dtype, const ArgumentsOf<kEpilogue>& arguments, cudaStream_t stream) {
    return dispatch_half(dtype, [&](auto tag) {
        using Element = typename decltype(tag)::type;
        static OncePerDevice shared_allowed;
        using Epilogue = typename EpilogueOf<kEpilogue, Element, kTile>::Type;
        // Tiles of rows: one for each full one, and a ragged one for each expert that has rows.
        constexpr TileShape kShape = tile_shape(kTile);
        const int64_t tiles =
            max_row_tiles(arguments.num_slots, arguments.num_experts, kShape.m * kShape.pair_m()) * arguments.tiles_n;
        return launch_persistent(grouped_gemm_kernel<Element, kTile, kRows, kWeightMajor, Epilogue>, shared_allowed,
                                 kShape.pair_m(), kThreads, shared_bytes(kTile), tiles, arguments, stream);
    });
}

template <Tile kTile, GatheredSide kGathered, GradVariant kVariant>
cudaError_t launch_weight_grad(DType dtype, const WeightGradArguments& arguments, cudaStream_t stream) {
    return dispatch_half(dtype, [&](auto tag) {
        using Element = typename decltype(tag)::type;
        static OncePerDevice shared_allowed;
        constexpr TileShape kShape = tile_shape(kTile);
        int64_t tiles = int64_t{arguments.num_experts} * ceil_div(arguments.tiles_m, kShape.pair_m()) *
                        ceil_div(arguments.tiles_n, kShape.pair_n());
        // Where tiles are fewer than SMs, tokens are not.
        constexpr bool kSums = kVariant == GradVariant::kBesideSum;
        if (kSums) tiles = std::max(tiles, arguments.beside.num_tokens);
        return launch_persistent(weight_grad_kernel<Element, kTile, kGathered, kVariant>, shared_allowed,
                                 kShape.pair_m() * kShape.pair_n(), block_threads(kSums),
                                 weight_grad_shared_bytes(kTile), tiles, arguments, stream);
    });
}

}  // namespace scattermoe::kernels::sm90
