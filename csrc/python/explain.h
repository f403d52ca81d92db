#pragma once

// Which kernels an operator launches for given sizes, in their order, and why those: csrc/kernels/select.h read aloud.
// No PyTorch and no CUDA in here.

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "../kernels/activation.h"
#include "../kernels/types.h"

namespace scattermoe {

struct ExplainQuery {
    std::string op;  // group_by_expert, parallel_linear, combine, moe_mlp or topk_gating
    bool backward = false;
    std::optional<int> arch;  // of the compiled code, 90 for 9.0; none: the CPU
    bool hopper = true;       // on 9.0: whether the kernels for it are there and wanted
    bool allow_tf32 = false;
    kernels::DType dtype = kernels::DType::kBFloat16;
    int64_t num_tokens = 0;
    int64_t num_experts = 0;
    int64_t top_k = 1;
    int64_t hidden_size = 0;        // of x; of the rows that combine reads
    int64_t intermediate_size = 0;  // of the output of parallel_linear, of act(z) in moe_mlp
    bool bias = false;
    bool transposed = false;  // weights are views of [E, in, out]
    bool grouped_in = false;
    bool grouped_out = false;
    Activation activation = Activation::kSwiglu;
    GluLayout glu_layout = GluLayout::kGateUp;
};

struct Launch {
    std::string step;
    std::string kernel;
    std::optional<std::array<int, 3>> tile;  // m, n, k of one stage
    std::optional<int> stages;
    std::string why;
};

// Every gradient is asked for in a backward. Throws std::invalid_argument for what is not an op or has no backward.
std::vector<Launch> explain(const ExplainQuery& query);

}  // namespace scattermoe
