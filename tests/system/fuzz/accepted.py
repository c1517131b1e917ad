"""The cases that are rightly accepted (exit code 0), each with the reason."""

import re

# the first pattern that matches the name of a case decides; None: it must be refused
ACCEPTED: list[tuple[str, str | None]] = [
    (r"^bench loss", None),  # the nanoGPT of these cases does not train
    (r"dataset_name.*has a name with (a newline|special)", None),  # a limit of `datasets`
    (r"has a name with|writes to a name with", "a name may have any character"),
    # options
    (r"='(--|.*=)?(dropout|seed|seeds|warmup_steps|eval_steps|save_steps|sample_steps)=0", "0 is a valid value"),
    (
        r"'--(dropout|seeds?|stride|warmup_steps|warmup|eval_steps|save_steps|sample_steps|hellaswag_steps|samples|"
        r"dataloader_num_workers|workers|learning_rate|muon_learning_rate|min_learning_rate|muon_momentum|weight_decay|"
        r"adam_beta1|adam_beta2|adam_epsilon|max_grad_norm|max_skipped_steps|temperature|top_k)=0'",
        "0 is a valid value",
    ),
    (r"'--(seed|seeds)=-1'", "a seed may be negative"),
    (
        r"'--(run_name|tokenizer_special_tokens|commit_message|license|dataset_split|dataset_config_name|dataset_revision|text_column|stop)=no",
        "any text is valid here, or the option has no effect for this source of text",
    ),
    (r"'--(prompt|sample_prompts)='", "the start of a new text"),
    # generation settings, tokenizer and configuration of transformers
    (
        r"(generate|train_accelerate.py|eval|hellaswag|export gpt2|replay): .*generation_config\.json",
        "transformers falls back on the settings of the configuration",
    ),
    (r"tokenizer_config\.json: ", "tokenizer.json alone is a tokenizer"),
    (r"replay: .*tokenizer", "the replay uses the tokenizer of the run's options"),
    (r"(eval: data|plan: ).*tokenizer\.json", "the model's own tokenizer is used, or none"),
    (r"data verify: .*tokenizer\.json: (an extra key|without (version|decoder))", "it gives the same ids"),
    (r"tokenizer\.json: (an extra key|without \w+|version=|decoder=)", "an optional part of a tokenizer"),
    (r"config\.json: (without |an extra key|eos_token_id|dtype|tie_word|model_type=)", "GPT-2's default is taken"),
    (
        r"(tinyrun|tinystep)/config\.json: (missing|a folder|a FIFO|a dangling link|a looping link|endless)",
        "the newest checkpoint of the run is taken, and a note says so",
    ),
    (r"safetensors: whole numbers", "they are converted"),
    (r"config\.json: intermediate_size=null", "4 * hidden_size"),
    (r"prompt\.txt: truncated", "it is text"),
    (r"plan: .*recipe\.yaml: no keys", "the defaults are planned"),
    (r"replay\.json: an extra key", "only the fields of a record are read"),
    (r"nanoshards/train\.bin: not UTF-8", "any two bytes are an id"),
    (r"quiz\.jsonl: an extra key", "only the fields of an item are read"),
    (r"eval: data: tinyshards/train", "only the validation split is read"),
    (r"replay: .*safetensors: (NaN|infinite)", "the replay looks for them"),
    # shards
    (r"manifest\.json: missing", "the shards are read as those of another program"),
    (
        r"manifest\.json: (without (source|options|eos_token|vocab_size|tokenizer_hash)|an extra|source=|options=)",
        "for information only",
    ),
    (r"data inspect: .*(zeros|noise|ids outside)", "every number of 16 bits is an id; `data verify` compares hashes"),
    (r"(train|val)[^:]*\.(bin|npy): zeros", "0 is a valid id"),
    (r"data inspect: .*tokenizer", "it only prints texts"),
    # texts
    (r"(story|chat)[^:]*: a folder", "a folder of texts"),
    (r"train_file.* is an empty folder", None),
    (r"story\.txt(\.gz|\.zst)?: (truncated|zeros)$", "it is text"),
    # records of a run
    (
        r"plot: .*metrics\.jsonl: (trunc|not UTF|without|an extra|elapsed_s|train/\w+=[-\d]|train/[^lt]|val/)",
        "what is there is drawn",
    ),
    (
        r"hub_upload\.py: .*safetensors: (a header|offsets|an absurd|noise|trunc|empty|zeros|missing|a f|a F)",
        None,
    ),
    (
        r"hub_upload\.py: .*(config|data|environment)\.json: (null|a [lntfF]|deep|noise|zeros|empty)",
        None,
    ),
    (r"hub_upload\.py: .*(is missing|is a FIFO|is unreadable|is below|is an empty)", None),
    (r"hub_upload\.py: ", "published as it is; the card needs nothing of it"),
    (r"plot: writes to a folder with files", "its files stay"),
    (
        r"bench load: writes to (the read-only|a FIFO|a dangling link|a looping link|a folder|a file)",
        "it writes NAME.json and NAME.md",
    ),
    (r"prepare: writes to a dangling link", "the folder that the link names is made"),
    (r"writes to a file$", "the file is replaced"),
]

# faults that stay, with the reason
KNOWN_LIMITS: list[tuple[str, str]] = [
    (r"bench loss: '--seeds=", "a valid value; the stand-in for nanoGPT then fails, whose output is shown in full"),
    (
        r"tokenizer\.json: without pre_tokenizer",
        "such a tokenizer gives other ids; the error, if there is one, is about the text",
    ),
]


def is_known_limit(name: str) -> bool:
    """Whether the case of this name is one of `KNOWN_LIMITS`."""
    return any(re.search(pattern, name) for pattern, _ in KNOWN_LIMITS)


def reason_to_accept(name: str) -> str | None:
    """Why exit code 0 is right for the case of this name; None if it must be refused."""
    return next((reason for pattern, reason in ACCEPTED if re.search(pattern, name)), None)
