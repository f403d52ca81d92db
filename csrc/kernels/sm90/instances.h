#pragma once

// The kernels there are, each compiled in a file of its own under instances/, for bfloat16 and float16.

#include <cuda_runtime.h>

#include "../select.h"
#include "arguments.h"
#include "tile.h"

namespace scattermoe::kernels::sm90 {

enum class EpilogueId : int { kStore, kSwiglu, kSwigluBackward };

template <EpilogueId kEpilogue>
struct EpilogueArgumentsOf;
template <>
struct EpilogueArgumentsOf<EpilogueId::kStore> {
    using Type = StoreArguments;
};
template <>
struct EpilogueArgumentsOf<EpilogueId::kSwiglu> {
    using Type = GluArguments;
};
template <>
struct EpilogueArgumentsOf<EpilogueId::kSwigluBackward> {
    using Type = GluBackwardArguments;
};

template <EpilogueId kEpilogue>
using ArgumentsOf = GroupedGemmArguments<typename EpilogueArgumentsOf<kEpilogue>::Type>;

// Defined in launch.h, which only the instances include.
template <Tile kTile, Rows kRows, Major kWeightMajor, EpilogueId kEpilogue>
cudaError_t launch_grouped_gemm(DType dtype, const ArgumentsOf<kEpilogue>& arguments, cudaStream_t stream);

template <Tile kTile, GatheredSide kGathered, GradVariant kVariant>
cudaError_t launch_weight_grad(DType dtype, const WeightGradArguments& arguments, cudaStream_t stream);

#define SCATTERMOE_GROUPED_GEMM(TILE, ROWS, MAJOR, EPILOGUE)                                              \
    template cudaError_t launch_grouped_gemm<Tile::TILE, Rows::ROWS, Major::MAJOR, EpilogueId::EPILOGUE>( \
        DType, const ArgumentsOf<EpilogueId::EPILOGUE>&, cudaStream_t)
#define SCATTERMOE_WEIGHT_GRAD(TILE, GATHERED, VARIANT)                                                \
    template cudaError_t launch_weight_grad<Tile::TILE, GatheredSide::GATHERED, GradVariant::VARIANT>( \
        DType, const WeightGradArguments&, cudaStream_t)

extern SCATTERMOE_GROUPED_GEMM(kPingPong128x192, kInOrder, kK, kStore);
extern SCATTERMOE_GROUPED_GEMM(kPingPong128x128, kInOrder, kK, kStore);
extern SCATTERMOE_GROUPED_GEMM(kCooperative128x256, kInOrder, kK, kStore);
extern SCATTERMOE_GROUPED_GEMM(kPaired128x256, kInOrder, kK, kStore);
extern SCATTERMOE_GROUPED_GEMM(kPingPong128x192, kInOrder, kMn, kStore);
extern SCATTERMOE_GROUPED_GEMM(kPingPong128x128, kInOrder, kMn, kStore);
extern SCATTERMOE_GROUPED_GEMM(kCooperative128x256, kInOrder, kMn, kStore);
extern SCATTERMOE_GROUPED_GEMM(kPaired128x256, kInOrder, kMn, kStore);

extern SCATTERMOE_GROUPED_GEMM(kPingPong128x192, kGathered, kK, kStore);
extern SCATTERMOE_GROUPED_GEMM(kPaired128x256, kGathered, kK, kStore);
extern SCATTERMOE_GROUPED_GEMM(kPaired128x256, kGathered, kMn, kStore);

extern SCATTERMOE_GROUPED_GEMM(kPingPong128x192, kGathered, kK, kSwiglu);
extern SCATTERMOE_GROUPED_GEMM(kPaired128x256, kGathered, kK, kSwiglu);

extern SCATTERMOE_GROUPED_GEMM(kPaired128x256, kGathered, kMn, kSwigluBackward);

extern SCATTERMOE_WEIGHT_GRAD(kPingPong128x192, kNeither, kPlain);
extern SCATTERMOE_WEIGHT_GRAD(kCooperative128x256, kNeither, kPlain);
extern SCATTERMOE_WEIGHT_GRAD(kPaired128x256, kLeft, kPlain);
extern SCATTERMOE_WEIGHT_GRAD(kPaired128x256, kLeft, kTransposed);
extern SCATTERMOE_WEIGHT_GRAD(kPaired128x256, kLeft, kBesideSum);
extern SCATTERMOE_WEIGHT_GRAD(kCooperative128x256, kLeft, kBesideSum);
extern SCATTERMOE_WEIGHT_GRAD(kPaired256x128, kRight, kBesideSum);
extern SCATTERMOE_WEIGHT_GRAD(kCooperative256x128, kRight, kBesideSum);

}  // namespace scattermoe::kernels::sm90
