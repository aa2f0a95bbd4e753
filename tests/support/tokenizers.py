"""A tiny real tokenizer: one token a character, `</s>` ends a text."""

import string

CHARACTERS = string.ascii_letters + string.digits + string.punctuation + " \n\t"
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def make_tokenizer(extra=(), *, swap=False, chat_template=None, lowercase=False, bos=False):
    """Ids: 0 <pad>, 1 </s>, 2 <unk>, then characters, then `extra`. `swap` exchanges the ids of a and b."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    characters = list(CHARACTERS)
    if swap:
        characters[:2] = reversed(characters[:2])
    words = ["<pad>", "</s>", "<unk>", *characters, *extra]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    if bos:  # texts begin with <pad>
        tokenizer.post_processor = processors.TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 0)])
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = chat_template
    return fast
