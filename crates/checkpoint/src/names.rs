//! Tensor names: from those in the file to ours, which are Hugging Face's for a plain text model.

use crate::notes::Note;
use std::borrow::Cow;

/// Beginnings of names, whole components of them, and what we call the same thing: multimodal repositories keep their text model
/// apart, and some families have names of their own for what every model has. Applied one after the other.
const SPELLINGS: [(&str, &str); 7] = [
    ("model.language_model", "model"),
    ("language_model", ""),
    ("backbone.layers", "model.layers"),
    ("backbone.embeddings", "model.embed_tokens"),
    ("backbone.norm_f", "model.norm"),
    ("model.embedding_norm", "model.norm"),
    ("model.final_layernorm", "model.norm"),
];

/// Parts of multimodal repositories that a text model does not use, as they are or below "model.".
const NOT_TEXT: [(&str, Note); 12] = [
    ("vision_tower.", Note::VisionUnused),
    ("vision_adapter.", Note::VisionUnused),
    ("vision_projection.", Note::VisionUnused),
    ("vision_model.", Note::VisionUnused),
    ("visual.", Note::VisionUnused),
    ("embed_vision.", Note::VisionUnused),
    ("vision_embedder.", Note::VisionUnused),
    ("multi_modal_projector.", Note::VisionUnused),
    ("mm_projector.", Note::VisionUnused),
    ("patch_merge_mlp.", Note::VisionUnused),
    ("audio_tower.", Note::AudioUnused),
    ("embed_audio.", Note::AudioUnused),
];

/// Our name for a stored tensor; None for one that the model does not use.
///
/// Dropped, as mlx-lm's `sanitize` does: precomputed rotary frequencies, the head's weight when it is tied to the embedding,
/// and the vision parts of multimodal repositories.
pub fn canonical(stored: &str, tied_embeddings: bool) -> Option<Cow<'_, str>> {
    if note(stored).is_some() || stored.contains("self_attn.rotary_emb.inv_freq") {
        return None;
    }
    let name = without_wrapper(stored);
    if tied_embeddings && name == "lm_head.weight" {
        return None;
    }
    Some(name)
}

/// What the person should know when a tensor of this name is not used.
pub(crate) fn note(stored: &str) -> Option<Note> {
    let name = stored.strip_prefix("model.").unwrap_or(stored);
    NOT_TEXT.iter().find(|(prefix, _)| name.starts_with(prefix)).map(|(_, note)| *note)
}

/// The name without the prefix of a multimodal repository and the like.
pub(crate) fn without_wrapper(stored: &str) -> Cow<'_, str> {
    let mut name = Cow::Borrowed(stored);
    for (prefix, ours) in SPELLINGS {
        let Some(rest) = name.strip_prefix(prefix) else { continue };
        if !(rest.is_empty() || rest.starts_with('.')) {
            continue;
        }
        name = match ours {
            "" => Cow::Owned(rest.trim_start_matches('.').to_owned()),
            ours => Cow::Owned(format!("{ours}{rest}")),
        };
    }
    name
}

/// The layer that a tensor belongs to by its name ("model.layers.12.mlp.up_proj.weight" is in 12).
pub fn layer_of(name: &str) -> Option<usize> {
    let (number, _) = name.strip_prefix("model.layers.")?.split_once('.')?;
    number.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_names_to_ours() {
        let cases = [
            ("model.norm.weight", false, Some("model.norm.weight")),
            ("language_model.model.norm.weight", false, Some("model.norm.weight")),
            ("model.language_model.norm.weight", false, Some("model.norm.weight")),
            ("language_model.lm_head.weight", false, Some("lm_head.weight")),
            ("language_model.model.embedding_norm.weight", false, Some("model.norm.weight")),
            ("backbone.layers.3.mixer.A_log", false, Some("model.layers.3.mixer.A_log")),
            ("backbone.embeddings", false, Some("model.embed_tokens")),
            ("backbone.norm_f.weight", false, Some("model.norm.weight")),
            ("language_models.weight", false, Some("language_models.weight")),
            ("language_model.lm_head.weight", true, None),
            ("lm_head.weight", true, None),
            ("lm_head.weight", false, Some("lm_head.weight")),
            ("model.layers.0.self_attn.rotary_emb.inv_freq", false, None),
            ("vision_tower.patch.weight", false, None),
            ("model.vision_tower.patch.weight", false, None),
            ("model.visual.patch.weight", false, None),
            ("audio_tower.conv.weight", false, None),
        ];
        for (stored, tied, expected) in cases {
            assert_eq!(canonical(stored, tied).as_deref(), expected, "{stored}");
        }
        assert_eq!(layer_of("model.layers.12.mlp.up_proj.weight"), Some(12));
        assert_eq!(layer_of("model.norm.weight"), None);
        assert_eq!(layer_of("model.layers.99999999999999999999.x"), None);
    }
}
