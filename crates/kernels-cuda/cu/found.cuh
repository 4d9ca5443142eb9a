// The token that a row gives, on its way to the host.
#pragma once
#include <stdint.h>

struct Largest {
    uint32_t index;
    float value; // NaN: something is not finite
};
