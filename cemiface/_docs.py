"""Steps of the documentation site, named in settings.ini: code blocks show code, and pages of results fold theirs."""
import re

FENCE = re.compile(r"(^```.*?^```)", re.M | re.S)
LINK = re.compile(r"\[(`[^`]*`)\]\(https?://[^)\s]*\)")


def plain_code(cell): # a cell of a notebook that nbdev is processing
    "Take the links out of code blocks in Markdown outputs."
    for out in cell.get("outputs", []):
        if text := "".join(out.get("data", {}).get("text/markdown", "")):
            out["data"]["text/markdown"] = FENCE.sub(lambda block: LINK.sub(r"\1", block[0]), text).splitlines(keepends=True)


class FoldResults:
    "Fold the code of a notebook of results: its text, tables and figures are what a reader comes for."
    def __init__(self, nb): self.nb = nb
    def end(self):
        front, *rest = self.nb.cells # nbdev has put title and description on top
        if not any("found = shown(" in c.source for c in rest if c.cell_type == "code"): return
        front.source = front.source.replace("---\n", "---\ncode-fold: true\n", 1)
