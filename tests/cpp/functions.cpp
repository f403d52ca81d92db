// Every function of the public header against loops over tokens, with its gradients, and what they say of bad input.

#include <ATen/ATen.h>
#include <scattermoe/scattermoe.h>

#include <cstdio>
#include <initializer_list>
#include <string>
#include <vector>

namespace {

constexpr int64_t kTokens = 7, kExperts = 3, kTopK = 2, kHidden = 8, kInner = 4;

int failures = 0;

void expect(bool right, const char* what) {
    if (right) return;
    std::printf("wrong: %s\n", what);
    ++failures;
}

at::Tensor random(at::IntArrayRef sizes) {
    return at::randn(sizes, at::kDouble).set_requires_grad(true);
}

// The outputs of both, and the gradients of a random sum of either for every input.
void expect_same(const at::Tensor& y, const at::Tensor& expected, std::initializer_list<at::Tensor> inputs,
                 const char* what) {
    expect(at::allclose(y, expected), what);
    const at::Tensor factor = at::randn_like(y);
    std::vector<at::Tensor> gradients;
    for (const at::Tensor& output : {y, expected}) {
        (output * factor).sum().backward({}, /*retain_graph=*/true);
        for (const at::Tensor& input : inputs) {
            gradients.push_back(input.grad().clone());
            input.mutable_grad().reset();
        }
    }
    for (size_t i = 0; i < inputs.size(); ++i) {
        expect(at::allclose(gradients[i], gradients[i + inputs.size()]), (std::string(what) + ", gradient").c_str());
    }
}

template <typename Call>
void expect_error(Call call, const std::string& message) {
    try {
        call();
    } catch (const c10::Error& error) {
        expect(std::string(error.what()).find(message) != std::string::npos, error.what_without_backtrace());
        return;
    }
    expect(false, ("no error: " + message).c_str());
}

}  // namespace

int main() {
    at::manual_seed(0);
    const at::Tensor x = random({kTokens, kHidden}), logits = random({kTokens, kExperts});
    const at::Tensor w_up = random({kExperts, 2 * kInner, kHidden}), b_up = random({kExperts, 2 * kInner});
    const at::Tensor w_down = random({kExperts, kHidden, kInner}), b_down = random({kExperts, kHidden});

    const auto [gates, expert_ids] = scattermoe::topk_gating(logits, kTopK, {.scoring = "sigmoid", .normalize = true});
    const at::Tensor best = std::get<0>(logits.sigmoid().topk(kTopK));
    expect_same(gates, best / best.sum(-1, /*keepdim=*/true), {logits}, "topk_gating");
    const auto [plain_gates, plain_ids] = scattermoe::topk_gating(logits, kTopK);
    expect_same(plain_gates, std::get<0>(logits.softmax(-1).topk(kTopK)), {logits}, "topk_gating without options");

    // The last choice of the last token is no expert.
    const at::Tensor ids = expert_ids.clone();
    ids[kTokens - 1][kTopK - 1] = -1;
    const scattermoe::Routing routing = scattermoe::route(ids, kExperts);
    expect(routing.num_tokens() == kTokens && routing.top_k() == kTopK && routing.num_experts() == kExperts,
           "sizes of the routing");
    expect(
        at::equal(routing.expert_counts().to(at::kLong), ids.flatten().add(1).bincount({}, kExperts + 1).slice(0, 1)),
        "expert_counts");
    expect(scattermoe::route(ids.select(1, 0), kExperts).top_k() == 1, "one choice a token");

    const at::Tensor g = at::rand({kTokens, kTopK}, at::kDouble).set_requires_grad(true);
    std::vector<at::Tensor> up_rows, tokens;
    for (int64_t t = 0; t < kTokens; ++t) {
        at::Tensor token = at::zeros({kHidden}, at::kDouble);
        for (int64_t j = 0; j < kTopK; ++j) {
            const int64_t e = ids[t][j].item<int64_t>();
            if (e < 0) {
                up_rows.push_back(at::zeros({2 * kInner}, at::kDouble));
                continue;
            }
            up_rows.push_back(w_up[e].matmul(x[t]) + b_up[e]);
            const at::Tensor up = up_rows.back();
            const at::Tensor hidden = at::gelu(up.slice(0, kInner)) * up.slice(0, 0, kInner);
            token = token + g[t][j] * (w_down[e].matmul(hidden) + b_down[e]);
        }
        tokens.push_back(token);
    }
    const at::Tensor rows = at::stack(up_rows);
    expect_same(scattermoe::parallel_linear(x, w_up, routing, b_up), rows, {x, w_up, b_up}, "parallel_linear");
    const at::Tensor grouped = scattermoe::parallel_linear(x, w_up, routing, b_up, false, /*grouped_out=*/true);
    const at::Tensor sums = (rows.view({kTokens, kTopK, -1}) * g.unsqueeze(-1)).sum(1);
    expect_same(scattermoe::combine(grouped, g, routing), sums, {x, w_up, b_up, g}, "combine, grouped");
    expect_same(scattermoe::combine(rows, g, routing, /*grouped=*/false), sums, {x, w_up, b_up, g},
                "combine, scattered");
    for (const bool recompute : {false, true}) {
        const at::Tensor y = scattermoe::moe_mlp(x, w_up, w_down, g, routing,
                                                 {.activation = "geglu",
                                                  .glu_layout = "up_gate",
                                                  .up_bias = b_up,
                                                  .down_bias = b_down,
                                                  .recompute = recompute});
        expect_same(y, at::stack(tokens), {x, w_up, w_down, b_up, b_down, g}, "moe_mlp");
    }

    expect_error([&] { scattermoe::parallel_linear(x.slice(1, 1), w_up, routing); },
                 "expected x.size(1) == weight.size(2), got 7 and 8");
    expect_error([&] { scattermoe::parallel_linear(x.sum(), w_up, routing); }, "expected x");
    expect_error([&] { scattermoe::moe_mlp(x, w_up, w_down, g, routing, {.activation = "tanh"}); }, "tanh");
    expect_error([&] { scattermoe::topk_gating(logits, kExperts + 1); }, "expected k");
    if (failures == 0) std::puts("ok");
    return failures == 0 ? 0 : 1;
}
