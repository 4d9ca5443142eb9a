//! [`Overlay`]: a 16-bit checkpoint with one layer replaced by its quantised form.

use std::collections::HashMap;
use std::path::Path;

use exrail_checkpoint::{
    Blocks, GptqConfig, GptqZeros, HfFolder, LoadError, QuantMethod, SafetensorsFile, TensorInfo,
    TensorView, Tensors, native_blocks,
};

use crate::QuantizeError;
use crate::plan::{Item, Treatment};
use crate::run::module;

/// The layer that follows sees what it will see in use: the blocks that a loader makes of the
/// written file.
pub(crate) struct Overlay<'a> {
    base: &'a HfFolder,
    replaced: HashMap<String, Replaced>,
}

struct Replaced {
    shape: [usize; 2],
    blocks: Blocks,
}

impl<'a> Overlay<'a> {
    /// Reads the quantised ones of `items` from the file `shard`.
    pub(crate) fn new(
        base: &'a HfFolder,
        shard: &Path,
        items: &[Item],
    ) -> Result<Overlay<'a>, QuantizeError> {
        let file = SafetensorsFile::open(shard)?;
        let mut replaced = HashMap::new();
        for item in items {
            let (Treatment::Quantise { grid, group, .. }, Some(name)) =
                (&item.treatment, &item.name)
            else {
                continue;
            };
            let (bits, group_size, zeros) = (grid.bits(), Some(*group), GptqZeros::LessOne);
            let method = QuantMethod::Gptq(GptqConfig { bits, group_size, zeros });
            let blocks = native_blocks(&method, module(&item.stored), &|name| file.raw(name))?;
            let Some(blocks) = blocks else {
                // Only a file that was changed since has other layers.
                let expected = format!("{bits} bits in groups of {group} as written");
                let key = item.stored.clone();
                let found = "others".to_owned();
                return Err(LoadError::BadValue { key, expected, found }.into());
            };
            let shape = [blocks.rows, blocks.columns];
            replaced.insert(name.clone(), Replaced { shape, blocks });
        }
        Ok(Overlay { base, replaced })
    }
}

impl Tensors for Overlay<'_> {
    fn info(&self, name: &str) -> Option<TensorInfo<'_>> {
        let base = self.base.info(name)?;
        Some(match self.replaced.get(name) {
            None => base,
            Some(Replaced { shape, blocks }) => {
                TensorInfo { name: base.name, dtype: blocks.dtype, shape }
            }
        })
    }

    fn tensor(&self, name: &str) -> Result<TensorView<'_>, LoadError> {
        match (self.replaced.get_key_value(name), self.base.info(name)) {
            (Some((name, Replaced { shape, blocks })), Some(_)) => {
                Ok(TensorView { name, dtype: blocks.dtype, shape, bytes: (&blocks.bytes).into() })
            }
            _ => self.base.tensor(name),
        }
    }

    fn names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        self.base.names()
    }
}
