"""Mathematics of the method: torch in, torch out; no files, no configuration, no CLIP.

Shape suffixes, here and wherever a tensor crosses a function boundary:

    B images          K text columns (foreground classes, then background prompts)   C foreground classes
    L encoder blocks  A attention heads   X pair channels   D feature width   E joint image-text width
    N = h*w patches   h w patch grid      H W pixels
"""
