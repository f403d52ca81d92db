// From the products' parameters to tensor maps and the kernel that select.h names.

#include <cstdlib>
#include <string_view>

#include "instances.h"
#include "select.h"
#include "sm90.h"
#include "tensor_map.h"

namespace scattermoe::kernels::sm90 {

namespace {

constexpr int kElementBytes = 2;

bool is_half(DType dtype) {
    return dtype == DType::kBFloat16 || dtype == DType::kFloat16;
}

// Rows, or matrices, start at multiples of 16 bytes.
bool stride_fits(int64_t stride) {
    return stride > 0 && stride * kElementBytes % kVectorBytes == 0;
}

bool matrix_fits(const void* data, int64_t stride, int64_t columns) {
    return is_vector_aligned(data) && stride_fits(stride) && stride >= columns && columns % 8 == 0 && columns > 0;
}

bool is_gathered(const RowMap& map) {
    return map.slot_order != nullptr;
}

bool stride_in_bytes_fits(int64_t stride) {
    return stride * kElementBytes <= UINT32_MAX;
}

// All but the output.
bool operands_fit(const GroupedGemmParams& p) {
    const bool k_contiguous = p.weight_k_stride == 1;
    if (!is_half(p.dtype) || (!k_contiguous && p.weight_n_stride != 1)) return false;
    const bool weight_fits =
        k_contiguous ? matrix_fits(p.weight, p.weight_n_stride, p.k) : matrix_fits(p.weight, p.weight_k_stride, p.n);
    return p.num_experts > 0 && p.n % 8 == 0 && weight_fits && stride_fits(p.weight_expert_stride) &&
           matrix_fits(p.in, p.in_stride, p.k) && stride_in_bytes_fits(p.in_stride) &&
           (p.bias == nullptr || is_vector_aligned(p.bias));
}

Major weight_major(const GroupedGemmParams& p) {
    return p.weight_k_stride == 1 ? Major::kK : Major::kMn;
}

GatheredMatrix gathered_matrix(const void* rows, int64_t stride, int columns, const RowMap& map) {
    return {static_cast<const char*>(rows), static_cast<uint32_t>(stride * kElementBytes), columns, map};
}

// The weight with its rows in `halves`, gates and ups; `interleaved`: in turns.
cudaError_t make_weight_map(CUtensorMap& map, const GroupedGemmParams& p, int halves, bool interleaved,
                            const TileShape& tile) {
    if (weight_major(p) == Major::kMn) {
        return make_tensor_map<3>(
            map, p.dtype, p.weight,
            {{p.n, p.k, p.num_experts}, {p.weight_k_stride, p.weight_expert_stride}, {64, kStageK, 1}});
    }
    const int64_t rows = p.n / halves, stride = p.weight_n_stride;
    return make_tensor_map<4>(
        map, p.dtype, p.weight,
        {{p.k, rows, halves, p.num_experts},
         {interleaved ? halves * stride : stride, interleaved ? stride : rows * stride, p.weight_expert_stride},
         {kStageK, tile.n / (tile.paired ? kPair : halves), 1, 1}});
}

// Everything but the epilogue's arguments.
template <typename Epilogue>
cudaError_t make_operands(GroupedGemmArguments<Epilogue>& a, const GroupedGemmParams& p, int halves, GluLayout layout,
                          const TileShape& tile) {
    const cudaError_t error =
        make_weight_map(a.weight_map, p, halves, halves == 2 && layout == GluLayout::kInterleaved, tile);
    if (error != cudaSuccess) return error;
    a.in = gathered_matrix(p.in, p.in_stride, p.k, p.in_rows);
    a.expert_offsets = p.expert_offsets;
    a.num_experts = p.num_experts;
    a.num_slots = p.num_slots;
    a.tiles_n = static_cast<int>(ceil_div(p.n / halves, tile.n / halves));
    a.by_tiles_n = FastDivider(a.tiles_n);
    a.k_blocks = static_cast<int>(ceil_div(p.k, kStageK));
    a.first_half = halves == 2 && layout == GluLayout::kUpGate ? 1 : 0;
    a.tile_counter = p.tile_counter;
    if (is_gathered(p.in_rows)) return cudaSuccess;
    return make_tensor_map<2>(a.in_map, p.dtype, p.in, {{p.k, p.num_slots}, {p.in_stride}, {kStageK, tile.m}});
}

// Sixteen rows by `box` columns of an output [S, halves, columns].
cudaError_t make_out_map(CUtensorMap& map, DType dtype, const void* out, int64_t rows, int64_t stride, int64_t halves,
                         int64_t columns, int box, int box_rows = 16) {
    return make_tensor_map<3>(map, dtype, out, {{columns, halves, rows}, {columns, stride}, {box, 1, box_rows}});
}

cudaError_t make_glu_map(GluMatrix& matrix, DType dtype, void* data, int64_t rows, int64_t width, GluLayout layout,
                         int box) {
    matrix.pointer = data;
    if (data == nullptr) return cudaSuccess;
    const int64_t halves = layout == GluLayout::kInterleaved ? 1 : 2;
    return make_out_map(matrix.map, dtype, data, rows, 2 * width, halves, 2 * width / halves, box);
}

}  // namespace

bool is_enabled() {
    static const bool enabled = [] {
        const char* const value = std::getenv("SCATTERMOE_PORTABLE_KERNELS");
        return value == nullptr || *value == '\0' || std::string_view(value) == "0";
    }();
    return enabled;
}

// ---- Plain ----

bool can_run(const GroupedGemmParams& p) {
    return operands_fit(p) && matrix_fits(p.out, p.out_stride, p.n);
}

cudaError_t grouped_gemm(const GroupedGemmParams& p, Tile tile, cudaStream_t stream) {
    GroupedGemmArguments<StoreArguments> a;
    const TileShape shape = tile_shape(tile);
    cudaError_t error = make_operands(a, p, 1, GluLayout::kGateUp, shape);
    if (error != cudaSuccess) return error;
    error = make_out_map(a.epilogue.out_map, p.dtype, p.out, p.num_slots, p.out_stride, 1, p.n, kStoreColumns);
    if (error != cudaSuccess) return error;
    a.epilogue.out = p.out;
    a.epilogue.stride = p.out_stride;
    a.epilogue.rows = p.out_rows;
    a.epilogue.bias = p.bias;
    a.epilogue.columns = p.n;

    const auto launch = [&]<Tile kTile, Rows kRows, Major kMajor>() {
        return launch_grouped_gemm<kTile, kRows, kMajor, EpilogueId::kStore>(p.dtype, a, stream);
    };
    if (is_gathered(p.in_rows)) {
        if (weight_major(p) == Major::kMn) {
            if (tile != Tile::kPaired128x256) return cudaErrorNotSupported;
            return launch.operator()<Tile::kPaired128x256, Rows::kGathered, Major::kMn>();
        }
        switch (tile) {
            case Tile::kPingPong128x192:
                return launch.operator()<Tile::kPingPong128x192, Rows::kGathered, Major::kK>();
            case Tile::kPaired128x256:
                return launch.operator()<Tile::kPaired128x256, Rows::kGathered, Major::kK>();
            default:
                return cudaErrorNotSupported;
        }
    }
    const auto in_order = [&]<Major kMajor>() {
        switch (tile) {
            case Tile::kPingPong128x192:
                return launch.template operator()<Tile::kPingPong128x192, Rows::kInOrder, kMajor>();
            case Tile::kPingPong128x128:
                return launch.template operator()<Tile::kPingPong128x128, Rows::kInOrder, kMajor>();
            case Tile::kPaired128x256:
                return launch.template operator()<Tile::kPaired128x256, Rows::kInOrder, kMajor>();
            case Tile::kCooperative128x256:
                return launch.template operator()<Tile::kCooperative128x256, Rows::kInOrder, kMajor>();
            default:
                return cudaErrorNotSupported;
        }
    };
    return weight_major(p) == Major::kK ? in_order.operator()<Major::kK>() : in_order.operator()<Major::kMn>();
}

cudaError_t grouped_gemm(const GroupedGemmParams& p, cudaStream_t stream) {
    const int64_t rows = p.num_slots / p.num_experts;
    const bool k_contiguous = p.weight_k_stride == 1;
    return grouped_gemm(p, select_store_tile(p.n, p.k, rows, is_gathered(p.in_rows), k_contiguous).tile, stream);
}

// ---- With the activation ----

bool can_run(const GluGemmParams& p) {
    const GroupedGemmParams& gemm = p.gemm;
    return operands_fit(gemm) && p.activation.activation == Activation::kSwiglu && is_gathered(gemm.in_rows) &&
           !is_gathered(gemm.out_rows) && weight_major(gemm) == Major::kK && gemm.n % 16 == 0 &&
           matrix_fits(p.hidden, gemm.n / 2, gemm.n / 2) &&
           (gemm.out == nullptr || (is_vector_aligned(gemm.out) && gemm.out_stride == gemm.n));
}

namespace {
bool needs_room(const GluGemmParams& p) {
    return p.gemm.bias != nullptr || p.activation.layout == GluLayout::kInterleaved;
}
}  // namespace

cudaError_t glu_gemm(const GluGemmParams& p, Tile tile, cudaStream_t stream) {
    const GroupedGemmParams& gemm = p.gemm;
    const TileShape shape = tile_shape(tile);
    const GluLayout layout = p.activation.layout;
    const int width = gemm.n / 2, columns = glu_store_columns(tile);
    if (!has_room_for_glu(tile) && needs_room(p)) return cudaErrorNotSupported;
    GroupedGemmArguments<GluArguments> a;
    cudaError_t error = make_operands(a, gemm, 2, layout, shape);
    if (error != cudaSuccess) return error;
    error = make_glu_map(a.epilogue.z, gemm.dtype, gemm.out, gemm.num_slots, width, layout, columns);
    if (error != cudaSuccess) return error;
    error = make_out_map(a.epilogue.hidden_map, gemm.dtype, p.hidden, gemm.num_slots, width, 1, width, columns);
    if (error != cudaSuccess) return error;
    a.epilogue.hidden = p.hidden;
    a.epilogue.bias = gemm.bias;
    a.epilogue.width = width;
    a.epilogue.layout = layout;
    a.epilogue.alpha = static_cast<float>(p.activation.alpha);
    a.epilogue.limit = static_cast<float>(p.activation.limit);
    switch (tile) {
        case Tile::kPingPong128x192:
            return launch_grouped_gemm<Tile::kPingPong128x192, Rows::kGathered, Major::kK, EpilogueId::kSwiglu>(
                gemm.dtype, a, stream);
        case Tile::kPaired128x256:
            return launch_grouped_gemm<Tile::kPaired128x256, Rows::kGathered, Major::kK, EpilogueId::kSwiglu>(
                gemm.dtype, a, stream);
        default:
            return cudaErrorNotSupported;
    }
}

cudaError_t glu_gemm(const GluGemmParams& p, cudaStream_t stream) {
    return glu_gemm(p, select_glu_tile(p.gemm.n / 2, needs_room(p)).tile, stream);
}

// ---- Backward through the activation ----

bool can_run(const GluBackwardGemmParams& p) {
    const GroupedGemmParams& gemm = p.gemm;
    return operands_fit(gemm) && p.activation.activation == Activation::kSwiglu && is_gathered(gemm.in_rows) &&
           weight_major(gemm) == Major::kMn && gemm.bias == nullptr && is_vector_aligned(p.z) &&
           is_vector_aligned(p.grad_z) && is_vector_aligned(p.gated_hidden);
}

cudaError_t glu_backward_gemm(const GluBackwardGemmParams& p, Tile tile, cudaStream_t stream) {
    const GroupedGemmParams& gemm = p.gemm;
    const GluLayout layout = p.activation.layout;
    GroupedGemmArguments<GluBackwardArguments> a;
    const TileShape shape = tile_shape(tile);
    if (p.grad_gates != nullptr && gemm.n > shape.n) return cudaErrorInvalidValue;
    const auto make_z_map = [&](CUtensorMap& map, const void* z, int box_rows) {
        const int64_t halves = layout == GluLayout::kInterleaved ? 1 : 2, columns = 2 * gemm.n / halves;
        return make_out_map(map, gemm.dtype, z, gemm.num_slots, 2 * gemm.n, halves, columns, kStoreColumns, box_rows);
    };
    cudaError_t error = make_operands(a, gemm, 1, layout, shape);
    if (error == cudaSuccess) error = make_z_map(a.epilogue.z_map, p.z, shape.m);
    if (error == cudaSuccess && p.grad_z != nullptr) error = make_z_map(a.epilogue.grad_z_map, p.grad_z, 16);
    if (error == cudaSuccess && p.gated_hidden != nullptr) {
        error = make_out_map(a.epilogue.gated_hidden_map, gemm.dtype, p.gated_hidden, gemm.num_slots, gemm.n, 1, gemm.n,
                             kStoreColumns);
    }
    if (error != cudaSuccess) return error;
    a.epilogue.grad_z = p.grad_z;
    a.epilogue.gated_hidden = p.gated_hidden;
    a.epilogue.gates = p.gates;
    a.epilogue.slot_order = p.slot_order;
    a.epilogue.gate_partials = p.gate_partials;
    a.epilogue.grad_gates = p.grad_gates;
    a.epilogue.num_slots = gemm.num_slots;
    a.epilogue.width = gemm.n;
    a.epilogue.layout = layout;
    switch (tile) {
        case Tile::kPaired128x256:
            return launch_grouped_gemm<Tile::kPaired128x256, Rows::kGathered, Major::kMn, EpilogueId::kSwigluBackward>(
                gemm.dtype, a, stream);
        default:
            return cudaErrorNotSupported;
    }
}

cudaError_t glu_backward_gemm(const GluBackwardGemmParams& p, cudaStream_t stream) {
    return glu_backward_gemm(p, select_glu_backward_tile().tile, stream);
}

// ---- Weight gradients ----

bool can_run(const WeightGradParams& p) {
    return is_half(p.dtype) && p.num_experts > 0 && p.num_slots > 0 && matrix_fits(p.left, p.left_stride, p.m) &&
           matrix_fits(p.right, p.right_stride, p.n) && matrix_fits(p.out, p.out_stride, p.n) &&
           stride_fits(p.out_expert_stride) && !(is_gathered(p.left_rows) && is_gathered(p.right_rows)) &&
           stride_in_bytes_fits(p.left_stride) && stride_in_bytes_fits(p.right_stride);
}

cudaError_t weight_grad(const WeightGradParams& p, Tile tile, cudaStream_t stream) {
    const TileShape shape = tile_shape(tile);
    const GatheredSide side = gathered_side(p);
    const bool gathers = side != GatheredSide::kNeither, sums = p.beside != nullptr;
    // The tile's rows are the right operand's columns then.
    const bool transposed = side == GatheredSide::kRight && shape.m < shape.n;
    if (sums && (!combines_beside(side) || transposed)) return cudaErrorNotSupported;
    WeightGradArguments a;
    cudaError_t error = make_tensor_map<3>(
        a.out_map, p.dtype, p.out,
        {{p.n, p.m, p.num_experts}, {p.out_stride, p.out_expert_stride}, {kStoreColumns, transposed ? 64 : 16, 1}});
    const auto make_operand_map = [&](CUtensorMap& map, const void* rows, int64_t stride, int64_t columns) {
        return make_tensor_map<2>(map, p.dtype, rows, {{columns, p.num_slots}, {stride}, {64, kStageK}});
    };
    if (error == cudaSuccess && side != GatheredSide::kLeft) {
        error = make_operand_map(transposed ? a.right_map : a.left_map, p.left, p.left_stride, p.m);
    }
    if (error == cudaSuccess && side != GatheredSide::kRight) {
        error = make_operand_map(a.right_map, p.right, p.right_stride, p.n);
    }
    if (error != cudaSuccess) return error;
    a.gathered = side == GatheredSide::kLeft ? gathered_matrix(p.left, p.left_stride, p.m, p.left_rows)
                                             : gathered_matrix(p.right, p.right_stride, p.n, p.right_rows);
    a.expert_offsets = p.expert_offsets;
    a.offsets_are_old = p.offsets_are_old;
    a.operands_are_old = p.operands_are_old;
    a.num_experts = p.num_experts;
    a.m = transposed ? p.n : p.m;
    a.n = transposed ? p.m : p.n;
    a.tiles_m = static_cast<int>(ceil_div(a.m, shape.m));
    a.tiles_n = static_cast<int>(ceil_div(a.n, shape.n));
    const int64_t tiles_m = ceil_div(a.tiles_m, shape.pair_m()), tiles_n = ceil_div(a.tiles_n, shape.pair_n());
    if (tiles_m * tiles_n > INT32_MAX) return cudaErrorInvalidConfiguration;
    a.by_tiles = FastDivider(static_cast<int32_t>(tiles_m * tiles_n));
    a.by_tiles_n = FastDivider(static_cast<int32_t>(tiles_n));
    a.tile_counter = p.tile_counter;
    if (sums) a.beside = *p.beside;

    const auto launch = [&]<Tile kTile, GatheredSide kSide, GradVariant kVariant>() {
        return launch_weight_grad<kTile, kSide, kVariant>(p.dtype, a, stream);
    };
    using Side = GatheredSide;
    using Variant = GradVariant;
    switch (tile) {
        case Tile::kPaired128x256:
            if (transposed) return launch.operator()<Tile::kPaired128x256, Side::kLeft, Variant::kTransposed>();
            if (!gathers) return cudaErrorNotSupported;
            return sums ? launch.operator()<Tile::kPaired128x256, Side::kLeft, Variant::kBesideSum>()
                        : launch.operator()<Tile::kPaired128x256, Side::kLeft, Variant::kPlain>();
        case Tile::kCooperative128x256:
            if (transposed) return cudaErrorNotSupported;
            return gathers ? launch.operator()<Tile::kCooperative128x256, Side::kLeft, Variant::kBesideSum>()
                           : launch.operator()<Tile::kCooperative128x256, Side::kNeither, Variant::kPlain>();
        case Tile::kPaired256x128:
            if (side != Side::kRight) return cudaErrorNotSupported;
            return launch.operator()<Tile::kPaired256x128, Side::kRight, Variant::kBesideSum>();
        case Tile::kCooperative256x128:
            if (side != Side::kRight) return cudaErrorNotSupported;
            return launch.operator()<Tile::kCooperative256x128, Side::kRight, Variant::kBesideSum>();
        case Tile::kPingPong128x192:
            if (gathers) return cudaErrorNotSupported;
            return launch.operator()<Tile::kPingPong128x192, Side::kNeither, Variant::kPlain>();
        default:
            return cudaErrorNotSupported;
    }
}

cudaError_t weight_grad(const WeightGradParams& p, cudaStream_t stream) {
    return weight_grad(p, select_weight_grad_tile(p.m, p.n, gathered_side(p), p.beside != nullptr).tile, stream);
}

}  // namespace scattermoe::kernels::sm90
