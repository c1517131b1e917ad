"""Hold a conversation with a model in the terminal, or answer the lines of a pipe.

The model must have been fine-tuned on conversations: its tokenizer has a chat template. Type /help for the commands.
Each line of a pipe is one question of the same conversation, and only the answers are printed.
"""

import argparse
import sys
from collections.abc import Sequence

from minigpt.utils.command_line import DTYPES, CommandParser, add_model_options, add_sampling_options


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of `minigpt chat`."""
    parser = CommandParser("minigpt chat", __doc__)
    add = parser.add_argument
    add_model_options(parser, dtypes=("auto", *DTYPES))
    add_sampling_options(parser, max_new_tokens=256, temperature=0.7, top_p=0.95)
    add("--system_prompt", metavar="TEXT", help="what the model is told before the conversation")
    add("--seed", type=int, default=0, metavar="S", help="seed of the first answer (default: %(default)s)")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """`minigpt chat`. Raises UserError if an option is impossible or the model cannot be used for a conversation.

    With a pipe it also raises UserError for the first question that cannot be answered.
    """
    from transformers.utils import logging

    from minigpt.data.tokenizer import load_tokenizer
    from minigpt.generation.chat_session import ChatSession
    from minigpt.generation.conversation import NO_CHAT_TEMPLATE, Conversation
    from minigpt.generation.sampling import Sampling
    from minigpt.modeling.loading import find_model, load_model
    from minigpt.utils.errors import UserError

    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_k, args.top_p)
    logging.set_verbosity_error()  # otherwise transformers warns about a long prompt, which is shortened anyway
    source = find_model(args.model)
    tokenizer = load_tokenizer(source, trust_remote_code=args.trust_remote_code, require_eos=False, require_fast=False)
    if not tokenizer.chat_template:  # before the weights are loaded
        raise UserError(f"model={args.model}: {NO_CHAT_TEMPLATE}")
    model = load_model(
        source, dtype=args.dtype, device=args.device, trust_remote_code=args.trust_remote_code, pack=True
    )
    session = ChatSession(Conversation(model, tokenizer, args.system_prompt), sampling, args.seed)
    if sys.stdin.isatty():
        session.run_at_keyboard()
    else:
        session.run_pipe()
