//! On a GPU: a matrix takes what its footprint says.

use exrail_kernels::{Backend, Footprint, InputRounding, WeightShape, WeightView};
use exrail_kernels_cuda::{CudaBackend, CudaFootprint, CudaOptions, free_memory};
use exrail_tensor::DType;

/// What the driver rounds an allocation up to at least.
const ALLOCATED: usize = 512;

fn view(shape: WeightShape, bytes: &[u8]) -> WeightView<'_> {
    let WeightShape { dtype, rows, columns, rounding, head } = shape;
    WeightView { name: "w", dtype, rows, columns, bytes, rounding, head }
}

#[test]
fn every_format_takes_what_its_footprint_says() {
    let backend = CudaBackend::open(CudaOptions::new(0)).expect("a GPU");
    let footprint = CudaFootprint { is_open: true };
    let mut n_shared = 0;
    for dtype in DType::ALL {
        for (rows, columns) in [(1, 256), (17, 512), (129, 1024)] {
            // Equal blocks share their scales; blocks that differ from their neighbours do not.
            for differ in [false, true] {
                let rounding = InputRounding::Once;
                let shape = WeightShape { dtype, rows, columns, rounding, head: false };
                let mut bytes = vec![0; shape.stored_bytes().expect("whole blocks")];
                if differ {
                    for (i, block) in bytes.chunks_mut(dtype.block_bytes()).enumerate() {
                        block[0] = i as u8;
                    }
                }
                let weight = backend.weight(&view(shape, &bytes)).expect("memory");
                let found = weight.len_bytes().next_multiple_of(ALLOCATED);
                let planned = footprint.weight_bytes(&shape).expect("a number");
                let expected = if differ { planned.most } else { planned.least };
                assert_eq!(found, expected, "{shape:?}, differ: {differ}");
                n_shared += usize::from(planned.least < planned.most && !differ);
            }
        }
    }
    assert!(n_shared > 0, "no format shared its scales");
}

#[test]
fn free_memory_is_less_than_the_card_has_and_falls_with_what_is_taken() {
    let backend = CudaBackend::open(CudaOptions::new(0)).expect("a GPU");
    let before = free_memory(0).expect("a GPU");
    assert!(before <= backend.facts().memory_bytes);
    let buffer = backend.buffer(64 << 20).expect("memory");
    let mut value = [1.0];
    backend.read(&buffer, &mut value);
    let after = free_memory(0).expect("a GPU");
    // Other tests of this process may give memory back meanwhile.
    assert!(before.saturating_sub(after) >= 128 << 20, "{before} before, {after} after 256 MiB");
}
