#include <ATen/ATen.h>
#include <scattermoe/scattermoe.h>

#include <cstdio>

int main() {
    at::manual_seed(0);
    const int64_t tokens = 7, experts = 3, top_k = 2, hidden = 8, inner = 4;
    auto x = at::randn({tokens, hidden}).set_requires_grad(true);
    auto w_up = at::randn({experts, 2 * inner, hidden}).set_requires_grad(true);
    auto w_down = at::randn({experts, hidden, inner}).set_requires_grad(true);
    auto [gates, expert_ids] = scattermoe::topk_gating(at::randn({tokens, experts}), top_k);
    auto [slot_order, slot_position, expert_offsets] = scattermoe::group_by_expert(expert_ids, experts);

    auto y = scattermoe::moe_mlp(x, w_up, std::nullopt, w_down, std::nullopt, gates, slot_order, slot_position,
                                 expert_offsets);
    y.sum().backward();

    auto expected = at::zeros_like(y);
    for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t j = 0; j < top_k; ++j) {
            const auto e = expert_ids[t][j].item<int64_t>();
            auto z = w_up[e].matmul(x[t]);
            auto h = at::silu(z.slice(0, 0, inner)) * z.slice(0, inner);
            expected[t] += gates[t][j] * w_down[e].matmul(h);
        }
    }
    const bool right = at::allclose(y, expected, 1e-4, 1e-5) && x.grad().defined() && w_up.grad().defined();
    std::puts(right ? "ok" : "wrong");
    return right ? 0 : 1;
}
