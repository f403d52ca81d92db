#include <scattermoe/scattermoe.h>
#include <torch/torch.h>

#include <cstdio>

int main() {
    torch::manual_seed(0);
    const int64_t tokens = 7, experts = 3, top_k = 2, hidden = 8, inner = 4;
    auto x = torch::randn({tokens, hidden}, torch::requires_grad());
    auto w_up = torch::randn({experts, 2 * inner, hidden}, torch::requires_grad());
    auto w_down = torch::randn({experts, hidden, inner}, torch::requires_grad());
    auto [gates, expert_ids] = scattermoe::topk_gating(torch::randn({tokens, experts}), top_k);
    auto [slot_order, slot_position, expert_offsets] = scattermoe::group_by_expert(expert_ids, experts);

    auto y = scattermoe::moe_mlp(x, w_up, std::nullopt, w_down, std::nullopt, gates, slot_order, slot_position,
                                 expert_offsets);
    y.sum().backward();

    auto expected = torch::zeros_like(y);
    for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t j = 0; j < top_k; ++j) {
            const auto e = expert_ids[t][j].item<int64_t>();
            auto z = w_up[e].matmul(x[t]);
            auto h = torch::silu(z.slice(0, 0, inner)) * z.slice(0, inner);
            expected[t] += gates[t][j] * w_down[e].matmul(h);
        }
    }
    const bool right = torch::allclose(y, expected, 1e-4, 1e-5) && x.grad().defined() && w_up.grad().defined();
    std::puts(right ? "ok" : "wrong");
    return right ? 0 : 1;
}
