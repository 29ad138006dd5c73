"""A step of the documentation site, named in settings.ini: a code block shows code, where nbdev has put links around names."""
import re

FENCE = re.compile(r"(^```.*?^```)", re.M | re.S)
LINK = re.compile(r"\[(`[^`]*`)\]\(https?://[^)\s]*\)")


def plain_code(cell): # a cell of a notebook that nbdev is processing
    "Take the links out of code blocks in Markdown outputs."
    for out in cell.get("outputs", []):
        if text := "".join(out.get("data", {}).get("text/markdown", "")):
            out["data"]["text/markdown"] = FENCE.sub(lambda block: LINK.sub(r"\1", block[0]), text).splitlines(keepends=True)
