#include "explain.h"

#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "../kernels/select.h"
#include "../kernels/sm90/select.h"

namespace scattermoe {

namespace {

using kernels::DType;
using kernels::GemmEngine;
using kernels::sm90::GatheredSide;

// A product rows W^T: [S, k] and [E, n, k] to [S, n].
struct Product {
    int64_t n;
    int64_t k;
    bool gathered;      // rows are read through the routing
    bool k_contiguous;  // in the weight
};

// A product left^T right over the rows of each expert: [S, m] and [S, n] to [E, m, n].
struct WeightGradient {
    int64_t m;
    int64_t n;
    bool left_gathered;
    bool right_gathered;
};

// The launches of one call, one method for each kind of kernel.
class Launches {
  public:
    explicit Launches(const ExplainQuery& query) : query_(query) {}

    const ExplainQuery& query() const { return query_; }
    int64_t num_slots() const { return query_.num_tokens * query_.top_k; }
    bool on_cpu() const { return !query_.arch.has_value(); }

    void product(const char* step, const Product& p) {
        if (num_slots() == 0 || p.n == 0) return;
        if (on_cpu()) return cpu_product(step);
        const kernels::GemmChoice choice = select(p);
        if (choice.engine == GemmEngine::kHopper) {
            return hopper(
                step, "sm90::grouped_gemm_kernel",
                kernels::sm90::select_store_tile(p.n, p.k, num_slots() / std::max<int64_t>(query_.num_experts, 1),
                                                 p.gathered, p.k_contiguous));
        }
        portable(step, "grouped_gemm_kernel", choice);
    }

    // The product and act(z) of its output, in one kernel where there is one.
    void up_projection(const Product& p, int64_t width) {
        if (num_slots() == 0 || p.n == 0) return;
        const bool fused = !on_cpu() && query_.activation == Activation::kSwiglu && p.gathered && p.k_contiguous &&
                           p.n % 16 == 0 && select(p).engine == GemmEngine::kHopper;
        if (fused) {
            const bool needs_room = query_.bias || query_.glu_layout == GluLayout::kInterleaved;
            return hopper("up projection with activation", "sm90::grouped_gemm_kernel",
                          kernels::sm90::select_glu_tile(width, needs_room));
        }
        product("up projection", p);
        rows("activation", "activation_forward_kernel", width);
    }

    // The product that gives the gradient of act(z), and the backward through act, likewise.
    void down_projection_backward(const Product& p) {
        const bool fused = num_slots() > 0 && p.n > 0 && !on_cpu() && query_.activation == Activation::kSwiglu &&
                           p.gathered && !p.k_contiguous && select(p).engine == GemmEngine::kHopper;
        if (!fused) {
            product("gradient of hidden", p);
            return rows("activation backward", "activation_backward_kernel", p.n);
        }
        hopper("gradient of hidden with activation backward", "sm90::grouped_gemm_kernel",
               kernels::sm90::select_glu_backward_tile());
        if (query_.bias) {
            add("gradient of gates", "gate_grad_bias_kernel", "what the tiles summed, and the bias's part");
        } else if (kernels::sm90::gate_parts(p.n) > 1) {
            add("gradient of gates", "gate_grad_kernel", "what the tiles summed, in the order of their columns");
        }
    }

    // sums: a sum over slots rides along.
    void weight_gradient(const std::string& step, WeightGradient p, bool sums = false) {
        if (query_.num_experts == 0 || p.m == 0 || p.n == 0) return;
        if (on_cpu()) return cpu_product(step);
        p = as_computed(p);
        const kernels::GemmChoice choice = select(p);
        if (choice.engine == GemmEngine::kHopper) {
            return hopper(
                step, "sm90::weight_grad_kernel",
                kernels::sm90::select_weight_grad_tile(p.m, p.n, gathered_side(p), sums),
                sums ? "; a fourth warpgroup sums rows meanwhile, for which this product leaves memory idle" : "");
        }
        portable(step, "weight_grad_kernel", choice,
                 one_gathered(p) ? "" : "; both operands are gathered, which the Hopper kernels do not do");
    }

    // Whether the kernel of a weight gradient takes a sum over slots along.
    bool combines_beside(const WeightGradient& p) const {
        return !on_cpu() && p.m > 0 && p.n > 0 && kernels::sm90::combines_beside(gathered_side(as_computed(p))) &&
               select(as_computed(p)).engine == GemmEngine::kHopper;
    }

    void bias_gradient(const char* step, int64_t n) {
        if (query_.num_experts == 0 || n == 0) return;
        if (on_cpu()) return add(step, "sum", "over the rows of each expert");
        const int64_t parts = kernels::bias_grad_parts(query_.num_experts, num_slots(), n);
        add(step, "bias_grad_kernel",
            parts == 1 ? "one block for each expert and its columns"
                       : "the rows of an expert in " + std::to_string(parts) + " parts, to fill the GPU");
        if (parts > 1) add(step, "add_parts_kernel", "the parts, always in the same order");
    }

    // A pass over rows of so many columns.
    void rows(const char* step, const char* kernel, int64_t columns) {
        if (num_slots() == 0 || columns == 0) return;
        if (on_cpu()) return add(step, "loop over rows", "threads share the rows, vectors the columns");
        add(step, kernel,
            aligned(columns) ? "memory traffic alone: 16 bytes at a time"
                             : "memory traffic alone: one element at a time, rows are no multiple of 16 bytes");
    }

    void token_warps(const char* step, const char* kernel) {
        if (query_.num_tokens == 0) return;
        if (on_cpu()) return add(step, "loop over tokens", "threads share the tokens");
        add(step, kernel, "one warp for each token, its scores in shared memory");
    }

    void counting_sort() {
        if (num_slots() == 0) return;
        if (on_cpu()) return add("sort slots by expert", "counting sort", "threads share the slots");
        const bool alone = num_slots() <= kernels::kSingleBlockSlots;
        const std::string limit = std::to_string(kernels::kSingleBlockSlots);
        if (!alone) {
            add("count slots of each expert", "count_kernel", "more than " + limit + " slots: a block for each chunk");
            add("sum counts of earlier chunks", "prefix_kernel", "experts side by side");
        }
        add("place slots", "rank_kernel",
            alone ? "up to " + limit + " slots: one block counts for itself" : "a block for each chunk");
    }

    std::vector<Launch> take() { return std::move(launches_); }

  private:
    // Whether every row of a contiguous matrix starts at a multiple of 16 bytes, as its first one does.
    bool aligned(int64_t columns) const {
        return columns * kernels::size_of(query_.dtype) % kernels::kVectorBytes == 0;
    }

    bool hopper_takes(int64_t a, int64_t b) const {
        return query_.hopper && query_.arch == 90 && kernels::size_of(query_.dtype) == 2 && a > 0 && b > 0 &&
               aligned(a) && aligned(b);
    }

    kernels::GemmChoice select(const Product& p) const {
        return kernels::select_gemm({query_.dtype, query_.allow_tf32, *query_.arch,
                                     aligned(p.k) && (p.k_contiguous || aligned(p.n)), num_slots(), query_.num_experts,
                                     /*weight_gradient=*/false, p.n, hopper_takes(p.n, p.k)});
    }

    // Into a transposed view goes the transposed product.
    WeightGradient as_computed(const WeightGradient& p) const {
        return query_.transposed ? WeightGradient{p.n, p.m, p.right_gathered, p.left_gathered} : p;
    }

    static bool one_gathered(const WeightGradient& p) { return !(p.left_gathered && p.right_gathered); }

    static GatheredSide gathered_side(const WeightGradient& p) {
        return p.left_gathered ? GatheredSide::kLeft : p.right_gathered ? GatheredSide::kRight : GatheredSide::kNeither;
    }

    kernels::GemmChoice select(const WeightGradient& p) const {
        return kernels::select_gemm({query_.dtype, query_.allow_tf32, *query_.arch, aligned(p.m) && aligned(p.n),
                                     num_slots(), query_.num_experts, /*weight_gradient=*/true, p.n,
                                     hopper_takes(p.m, p.n) && one_gathered(p) && num_slots() > 0});
    }

    void cpu_product(const std::string& step) {
        const bool own = query_.dtype == kernels::DType::kFloat32;
        add(step, own ? "gemm_avx512 or ATen matrix product" : "ATen matrix product",
            std::string("one for each expert, experts side by side on threads; the largest run alone with all threads "
                        "where the others would wait for them") +
                (own ? "; ATen's without AVX-512 and where threads share a product" : ""));
    }

    void portable(const std::string& step, const char* kernel, const kernels::GemmChoice& choice,
                  const char* more = "") {
        const kernels::GemmTile tile = kernels::tile_shape(choice.tile);
        launches_.push_back({step, std::string(choice.engine == GemmEngine::kSimt ? "simt::" : "sm80::") + kernel,
                             std::array{tile.m, tile.n, tile.k_elements(kernels::size_of(query_.dtype))}, tile.stages,
                             std::string(choice.why) + (query_.arch == 90 && query_.hopper ? more : "")});
    }

    void hopper(const std::string& step, const char* kernel, const kernels::sm90::TileChoice& choice,
                const char* more = "") {
        const kernels::sm90::TileShape shape = kernels::sm90::tile_shape(choice.tile);
        launches_.push_back({step, kernel, std::array{shape.m, shape.n, kernels::sm90::kStageK},
                             kernels::sm90::stage_count(choice.tile), std::string("wgmma, ") + choice.why + more});
    }

    void add(const std::string& step, const char* kernel, std::string why) {
        launches_.push_back({step, kernel, std::nullopt, std::nullopt, std::move(why)});
    }

    ExplainQuery query_;
    std::vector<Launch> launches_;
};

// ---- One function for each op and direction, in the order of csrc/ops/cuda ----

void parallel_linear(Launches& out) {
    const ExplainQuery& q = out.query();
    out.product("rows times weights", {q.intermediate_size, q.hidden_size, !q.grouped_in, !q.transposed});
}

void parallel_linear_backward(Launches& out) {
    const ExplainQuery& q = out.query();
    out.product("gradient of x", {q.hidden_size, q.intermediate_size, !q.grouped_out, q.transposed});
    if (q.top_k > 1 && !q.grouped_in) out.rows("gradient of x, sum over slots", "combine_kernel", q.hidden_size);
    out.weight_gradient("gradient of weight", {q.intermediate_size, q.hidden_size, !q.grouped_out, !q.grouped_in});
    if (q.bias) out.bias_gradient("gradient of bias", q.intermediate_size);
}

int64_t up_features(const ExplainQuery& q) {
    return is_gated(q.activation) ? 2 * q.intermediate_size : q.intermediate_size;
}

void moe_mlp(Launches& out) {
    const ExplainQuery& q = out.query();
    out.up_projection({up_features(q), q.hidden_size, /*gathered=*/true, !q.transposed}, q.intermediate_size);
    out.product("down projection", {q.hidden_size, q.intermediate_size, /*gathered=*/false, !q.transposed});
    out.rows("sum over experts", "combine_kernel", q.hidden_size);
}

void moe_mlp_backward(Launches& out) {
    using kernels::SumPlace;
    const ExplainQuery& q = out.query();
    const WeightGradient w_down{q.hidden_size, q.intermediate_size, /*left_gathered=*/true, /*right_gathered=*/false};
    const WeightGradient w_up{up_features(q), q.hidden_size, /*left_gathered=*/false, /*right_gathered=*/true};
    SumPlace place = kernels::place_of_sum(out.num_slots(), q.num_experts, q.hidden_size, q.intermediate_size, w_up.m);
    if ((place == SumPlace::kBesideDownGradient && !out.combines_beside(w_down)) ||
        (place == SumPlace::kBesideUpGradient && !out.combines_beside(w_up))) {
        place = SumPlace::kAlone;
    }

    const bool behind_down = place == SumPlace::kBehindDownGradient;
    const bool rows_first = behind_down || place == SumPlace::kBesideDownGradient;
    const auto rows_of_x = [&] {
        out.product("gradient of x", {q.hidden_size, up_features(q), /*gathered=*/false, q.transposed});
    };
    const auto weight_gradient = [&](const std::string& step, const WeightGradient& p, SumPlace beside) {
        if (place != beside) return out.weight_gradient(step, p);
        out.weight_gradient(step + ", beside it gradient of x, sum over experts", p, /*sums=*/true);
    };
    if (q.bias) out.bias_gradient("gradient of down_bias", q.hidden_size);
    out.down_projection_backward({q.intermediate_size, q.hidden_size, /*gathered=*/true, q.transposed});
    const auto sum_of_x = [&] { out.rows("gradient of x, sum over experts", "combine_kernel", q.hidden_size); };
    if (rows_first) rows_of_x();
    weight_gradient("gradient of w_down", w_down, SumPlace::kBesideDownGradient);
    if (behind_down) sum_of_x();
    if (q.bias) out.bias_gradient("gradient of up_bias", up_features(q));
    if (!rows_first) rows_of_x();
    if (place == SumPlace::kAlone) sum_of_x();
    weight_gradient("gradient of w_up", w_up, SumPlace::kBesideUpGradient);
}

}  // namespace

std::vector<Launch> explain(const ExplainQuery& query) {
    Launches out(query);
    const bool backward = query.backward;
    if (query.op == "group_by_expert") {
        if (backward) throw std::invalid_argument("group_by_expert has no backward");
        out.counting_sort();
    } else if (query.op == "parallel_linear") {
        backward ? parallel_linear_backward(out) : parallel_linear(out);
    } else if (query.op == "combine") {
        out.rows(backward ? "gradient of rows and gates" : "sum over experts",
                 backward ? "combine_backward_kernel" : "combine_kernel", query.hidden_size);
    } else if (query.op == "moe_mlp") {
        backward ? moe_mlp_backward(out) : moe_mlp(out);
    } else if (query.op == "topk_gating") {
        out.token_warps(backward ? "gradient of logits" : "score and select",
                        backward ? "topk_gating_backward_kernel" : "topk_gating_kernel");
    } else {
        throw std::invalid_argument(
            "unknown op '" + query.op +
            "', expected one of group_by_expert, parallel_linear, combine, moe_mlp, topk_gating");
    }
    return out.take();
}

}  // namespace scattermoe
