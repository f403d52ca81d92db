#include <ATen/core/dispatch/Dispatcher.h>

#include <cstdio>

int main() {
    const bool found = c10::Dispatcher::singleton().findSchema({"scattermoe::moe_mlp", ""}).has_value();
    std::puts(found ? "ok" : "not registered");
    return found ? 0 : 1;
}
