"""Runs in a process of its own: one engine as an application has it, whose prompts are looked into."""

from __future__ import annotations

import json
import sys

from safetensors.torch import save_file


def refusal(attempt):
    """The line that an attempt is refused with."""
    from kvprofile.errors import InputError

    try:
        attempt()
    except InputError as error:
        return str(error)
    return None


def main():
    job = json.load(sys.stdin)
    from vllm import SamplingParams

    from kvprofile.capture import ENGINE_ARGUMENTS
    from kvprofile.capture.marks import Mark
    from kvprofile.capture.session import Session, marked
    from kvprofile.client import VLLMClient

    client = VLLMClient(**job["engine"], **ENGINE_ARGUMENTS)
    llm = client._back.llm
    options = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]

    def generate():
        return [list(found.outputs[0].token_ids) for found in llm.generate(prompts, options, use_tqdm=False)]

    notes = {"before": generate()}
    tensors = {}
    for name, prompt in (("ids", job["prompts"][0]), ("text", job["text"])):
        found = client.capture_prompt(prompt, chunk_tokens=job["chunk_tokens"])
        tensors |= {f"{name}.{key}": tensor for key, tensor in found.summaries.items()}
        tensors[f"{name}.scores"] = found.token_scores
        notes[name] = [found.prompt_tokens, found.prefix_tokens, list(found.layers)]
    notes["without scores"] = client.capture_prompt(job["text"], scores=False).token_scores is None
    notes["too long"] = refusal(lambda: client.capture_prompt(list(range(4, 1000)), chunk_tokens=500))
    with Session(llm) as session:
        notes["second session"] = refusal(lambda: Session(llm).__enter__())
        mark = Mark("beside", len(job["prompts"][0]))
        llm.generate(prompts, [marked(options, mark), *[options] * (len(prompts) - 1)], use_tqdm=False)
        notes["beside another"] = refusal(lambda: session.take(mark))
    notes["after"] = generate()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, job["output"])
    print("RESULT", json.dumps(notes))


if __name__ == "__main__":
    main()
