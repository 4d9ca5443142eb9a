//! What a model thinks before it answers, and who opens it.
//!
//! Some templates end their prompt with the opening marker (field-faults B15): then the answer begins inside
//! the thought, and a lock that held from its first token would put the answer there.

use super::detect::THOUGHTS;

/// The markers around a thought.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Thoughts {
    /// Opens it, such as `<think>`.
    pub open: String,
    /// Closes it, such as `</think>`.
    pub close: String,
}

/// Where an answer stands to a thought when it begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThoughtLead {
    /// This model does not think, or the prompt has closed its thought.
    Absent,
    /// The answer may begin with the marker that opens one.
    MayOpen,
    /// The prompt ends with that marker: the answer begins inside.
    IsOpen,
}

impl Thoughts {
    /// What closes a thought, of all families.
    pub fn ends() -> impl Iterator<Item = &'static str> {
        THOUGHTS.iter().map(|(_, close)| *close)
    }

    /// What the prompt leaves to the answer.
    #[must_use]
    pub fn lead(&self, prompt: &str) -> ThoughtLead {
        let prompt = prompt.trim_end();
        if prompt.ends_with(&self.open) {
            ThoughtLead::IsOpen
        } else if prompt.ends_with(&self.close) {
            ThoughtLead::Absent
        } else {
            ThoughtLead::MayOpen
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn b15_the_prompt_says_who_opens_the_thought() {
        let thoughts = Thoughts { open: "<think>".into(), close: "</think>".into() };
        for (prompt, lead) in [
            ("assistant\n<think>\n", ThoughtLead::IsOpen),
            ("assistant\n<think>\n\n</think>\n\n", ThoughtLead::Absent),
            ("<think>a</think> b\nassistant\n", ThoughtLead::MayOpen),
        ] {
            assert_eq!(thoughts.lead(prompt), lead, "{prompt}");
        }
    }
}
