// Rows of activations, and the norm that they go through.
#pragma once

// A row that a product takes as it is, or through an RMS norm; or the first of several. `src/linear.rs`
// has the same fields in the same order.
struct Row {
    const float *x;
    const float *norm; // its weight, or null
    float eps;
};
