#pragma once

// The library is compiled with hidden visibility: only what carries this macro can be linked against.
#define SCATTERMOE_API __attribute__((visibility("default")))
