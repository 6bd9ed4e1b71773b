"""The page of mann-fast draw: what a drawing is to the model, what is shown of an answer, and the page itself (gradio)."""

from __future__ import annotations

import base64
import copy
import html
import io
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from ..learner import FewShotLearner
from ..training.recall import Recall

# A drawing as the characters of Omniglot are: pixels a side, of the symbol and of the pen.
SIDE, SYMBOL, PEN = 105, 66, 4
LEAST = 0.2  # of the canvas: what is smaller is not enlarged to fill the square, so a dot stays a dot
MOST = 200_000  # characters that a drawing may take: hours of scribbling
COLOURS = ("#3b6ea5", "#c46a3f", "#5b8c5a", "#8a5a9e", "#b08d2e", "#3f8f8f", "#a8486b", "#6b6f76")


class Example(NamedTuple):
    """A drawing, uint8 [S, S] with ink 255 on 0, and the name that it was given."""

    ink: np.ndarray
    name: str


def drawing(canvas: str | None) -> np.ndarray | None:
    """The ink of a drawing, uint8 [S, S], 255 on 0, moved and scaled to where a symbol of Omniglot is. None without any ink.

    canvas: JSON of the strokes, each a list of points [x, y], from 0 to 1 on the canvas. Raises ValueError for anything else.
    """
    wrong = "a drawing must be a list of strokes, each of points [x, y] from 0 to 1"
    if not canvas:
        return None
    if len(canvas) > MOST:
        raise ValueError(f"a drawing may take {MOST:,} characters, got {len(canvas):,}")
    try:
        strokes = [np.array(stroke, float) for stroke in json.loads(canvas)]
    except (ValueError, TypeError) as error:
        raise ValueError(wrong) from error
    strokes = [stroke for stroke in strokes if stroke.size]
    if not strokes:
        return None
    if any(s.ndim != 2 or s.shape[1] != 2 or not ((s >= 0) & (s <= 1)).all() for s in strokes):
        raise ValueError(wrong)
    points = np.concatenate(strokes)
    low, high = points.min(0), points.max(0)
    scale = SYMBOL / max(*(high - low), LEAST)
    finer = 4  # Pillow draws without smoothing
    image = Image.new("L", (finer * SIDE, finer * SIDE))
    draw = ImageDraw.Draw(image)
    for stroke in strokes:
        placed = [tuple(xy) for xy in finer * (SIDE / 2 + (stroke - (low + high) / 2) * scale)]
        draw.line(placed, 255, finer * PEN, joint="curve")
        for x, y in (placed[0], placed[-1]):
            r = finer * PEN / 2
            draw.ellipse((x - r, y - r, x + r, y + r), 255)
    return np.asarray(image.reduce(finer))


def colours_of(examples: Sequence[Example]) -> dict[str, str]:
    """Of each name, in the order in which they came."""
    names = dict.fromkeys(example.name for example in examples)
    return {name: COLOURS[at % len(COLOURS)] for at, name in enumerate(names)}


def thumbnail(ink: np.ndarray, colour: str, note: str = "") -> str:
    """A small picture of a drawing, with a line below it."""
    small = Image.fromarray(255 - ink).resize((56, 56), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return (
        f'<figure style="--of: {colour}"><img alt="" src="data:image/png;base64,{data}">'
        f"<figcaption>{note}</figcaption></figure>"
    )


def show_examples(examples: Sequence[Example], ways: int) -> str:
    """What the memory has been shown, by name."""
    title = "<h4>What it remembers</h4>"
    if not examples:
        return (
            f'{title}<p class="hint">Nothing yet. Draw a symbol, name it, press <b>Remember</b>; two or three drawings of each '
            f"symbol are better than one. This model tells up to {ways} symbols apart.</p>"
        )
    rows = []
    for name, colour in colours_of(examples).items():
        pictures = "".join(thumbnail(e.ink, colour) for e in examples if e.name == name)
        rows.append(f'<div class="row of"><b style="color: {colour}">{html.escape(name)}</b>{pictures}</div>')
    return f'{title}<div class="row">{"".join(rows)}</div>'


def show_answer(learner: FewShotLearner, examples: Sequence[Example], ink: np.ndarray | None) -> str:
    """The answer of a learner that has learned these examples to a drawing: how sure, from which examples, in which slots."""
    if ink is None or len(colours_of(examples)) < 2:
        wanted = "Draw something, and see what it is." if ink is None else "Teach it two symbols or more."
        return f'<p class="hint">{wanted}</p>'
    mean, deviation = (part[0] for part in learner.predict_proba([ink], return_std=True))
    colours, found = colours_of(examples), learner.recall([ink])
    names = learner.classes_.tolist()
    best = int(mean.argmax())
    bars = "".join(
        f'<div class="bar" style="--of: {colours[names[at]]}"><span>{html.escape(names[at])}</span>'
        f'<i><em style="width: {mean[at]:.1%}"></em></i><span>{mean[at]:.0%} ± {deviation[at] * 100:.0f}</span></div>'
        for at in np.argsort(-mean, kind="stable")
    )
    shares = found.examples[0].numpy()
    sources = "".join(
        thumbnail(examples[at].ink, colours[examples[at].name], f"{shares[at]:.0%}")
        for at in np.argsort(-shares, kind="stable")[:6]
    )
    own = (found.slots * found.holds[..., -1]).sum(2).mean().item()
    rest = (
        f"The drawing itself had written {own:.0%}. " if own else ""
    )  # of a memory that writes before it reads
    rest += f"The other {max(0, 1 - shares.sum() - own):.0%} was there before all of them."
    return (
        f'<div class="answer" style="color: {colours[names[best]]}">{html.escape(names[best])}</div>{bars}'
        f'<p class="hint">Probability, ± deviation over {learner.orders} orders of the examples.</p>'
        f"<h4>Read from</h4><div class='row'>{sources}</div>"
        f"<p class='hint'>Share of what was read that each example had written. {rest}</p>"
        f"<h4>Slots of the memory</h4>{show_slots(found, examples, colours)}"
        "<p class='hint'>In one of the orders: the darker a slot, the more was read there; the colour is that of the example "
        "which wrote most of it.</p>"
    )


def show_slots(found: Recall, examples: Sequence[Example], colours: dict[str, str]) -> str:
    """The slots of the first order of a recall of one image."""
    slots, holds = found.slots[0, 0].numpy(), found.holds[0, 0].numpy()
    cells = []
    for at, (share, sources) in enumerate(zip(slots, holds, strict=True)):
        source = int(sources.argmax())
        written = sources[source] > 0.5
        by = examples[source].name if written and source < len(examples) else None
        colour = colours[by] if by is not None else "#6b6f76"
        whose = by if by is not None else "this drawing" if written else "nothing"
        title = html.escape(f"slot {at}: {share:.1%} of what was read; written by {whose}")
        strength = share / max(slots.max(), 1e-9)
        cells.append(f'<i title="{title}" style="--of: {colour}; --much: {strength:.2f}"></i>')
    return f'<div class="slots">{"".join(cells)}</div>'


def judge(learner: FewShotLearner, examples: Sequence[Example], ink: np.ndarray | None) -> str:
    """:func:`show_answer`, by a learner that is left as it was, so that many visitors can share its model."""
    if not examples:
        return show_answer(learner, examples, ink)
    own = copy.copy(learner).fit([e.ink for e in examples], [e.name for e in examples])
    return show_answer(own, examples, ink)


def add_example(
    examples: tuple[Example, ...], ink: np.ndarray | None, name: str, ways: int
) -> tuple[Example, ...]:
    """With one more; ValueError, whose message says what to do, without ink or name or for more names than ``ways``."""
    name = name.strip()
    if ink is None:
        raise ValueError("Draw a symbol first.")
    if not name:
        raise ValueError("Give the symbol a name.")
    more = (*examples, Example(ink, name))
    if len(colours_of(more)) > ways:
        raise ValueError(f"This model tells {ways} symbols apart; forget some first.")
    return more


STYLE = """
.gradio-container main { max-width: 1000px !important; margin: 0 auto !important; padding: 1rem !important; }
.gradio-container .html-container { padding: 0 !important; }
.gradio-container h1 { font-weight: 500; margin-bottom: 0; }
/* gradio centres the shorter column, and the canvas would move below the pen as an answer comes. */
#desk { align-items: flex-start; }
.hint { color: #7a7f87; font-size: 0.85rem; margin: 0.3rem 0; }
h4 { font-weight: 600; margin: 0.9rem 0 0.3rem; }
.answer { font-size: 2.6rem; line-height: 1.2; font-weight: 500; margin-bottom: 0.4rem; overflow-wrap: anywhere; }
.bar { display: grid; grid-template-columns: 7rem 1fr 5.5rem; gap: 0.7rem; align-items: center; margin: 0.25rem 0; }
.bar span:first-child { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.bar span:last-child { text-align: right; font-variant-numeric: tabular-nums; }
.bar i { background: #ece9e3; border-radius: 4px; height: 0.7rem; overflow: hidden; }
.bar em { display: block; background: var(--of); height: 100%; transition: width 0.25s; }
#answer { margin: 0 0 0 clamp(0rem, 5vw - 1.5rem, 1.5rem) !important; }  /* none below the canvas on a phone */
.row { display: flex; flex-wrap: wrap; align-items: center; gap: 0.5rem; margin: 0.2rem 0; }
.row.of { margin-right: 1.6rem; }
.row b { font-weight: 600; margin-right: 0.3rem; }
.row figure { margin: 0; text-align: center; font-size: 0.8rem; color: #7a7f87; }
.row img { display: block; width: 56px; height: 56px; border: 1px solid #ddd8cf; border-bottom: 3px solid var(--of);
    border-radius: 6px; }
.slots { display: grid; grid-template-columns: repeat(32, 1fr); gap: 2px; }
.slots i { aspect-ratio: 1; border-radius: 2px;
    background: color-mix(in srgb, var(--of) calc(8% + 92% * var(--much)), #f6f3ee); }
"""

# The canvas: its value is the JSON that drawing() reads. gradio's own (Sketchpad) forgets its brush whenever it is emptied.
CANVAS = """<canvas width="720" height="720" aria-label="Draw here"></canvas>
<div><button data-do="undo">Undo</button><button data-do="clear">Clear</button></div>"""
CANVAS_STYLE = """
canvas { width: 100%; aspect-ratio: 1; background: #fff; border: 1px solid #ddd8cf; border-radius: 12px; cursor: crosshair;
    touch-action: none; display: block; }
div { display: flex; gap: 1.2rem; justify-content: flex-end; }
button { color: #7a7f87; font-size: 0.85rem; padding: 0.3rem; background: none; border: none; cursor: pointer; }
button:hover { color: #20242a; }
"""
CANVAS_SCRIPT = """
let strokes = [], drawing = false;
const paint = () => {
    const canvas = element.querySelector('canvas'), size = canvas.width, to = canvas.getContext('2d');
    to.clearRect(0, 0, size, size);
    Object.assign(to, {lineWidth: size / 36, lineCap: 'round', lineJoin: 'round', strokeStyle: '#20242a'});
    for (const stroke of strokes) {
        to.beginPath();
        to.moveTo(stroke[0][0] * size, stroke[0][1] * size);
        for (const [x, y] of stroke) to.lineTo(x * size, y * size);
        to.stroke();
    }
};
const add = event => {
    const box = element.querySelector('canvas').getBoundingClientRect();
    const place = (at, start, length) => Math.round(1e4 * Math.min(1, Math.max(0, (at - start) / length))) / 1e4;
    strokes[strokes.length - 1].push([place(event.clientX, box.left, box.width), place(event.clientY, box.top, box.height)]);
    paint();
};
const say = () => { props.value = JSON.stringify(strokes); paint(); trigger('input'); };
element.addEventListener('pointerdown', event => {
    if (event.target.tagName !== 'CANVAS' || event.button !== 0 || drawing) return;
    event.target.setPointerCapture(event.pointerId);
    drawing = true;
    strokes.push([]);
    add(event);
});
element.addEventListener('pointermove', event => { if (drawing) add(event); });
for (const name of ['pointerup', 'pointercancel'])
    element.addEventListener(name, () => { if (drawing) { drawing = false; say(); } });
element.addEventListener('click', event => {
    const what = event.target.dataset.do;
    if (what === 'undo') strokes.pop();
    if (what === 'clear') strokes = [];
    if (what) say();
});
watch('value', () => { if (!drawing) { strokes = JSON.parse(props.value || '[]'); paint(); } });
"""


def make_page(learner: FewShotLearner) -> tuple[Any, dict[str, Any]]:
    """The page, a ``gradio.Blocks``, and how it looks: options of its ``launch``. All that a visitor teaches stays in the
    visitor's own session."""
    import gradio

    ways = learner.config.ways

    def answer(canvas: str, examples: tuple[Example, ...]) -> str:
        return judge(learner, examples, drawing(canvas))

    def remember(canvas: str, name: str, examples: tuple[Example, ...]) -> tuple[Any, ...]:
        try:
            examples = add_example(examples, drawing(canvas), name, ways)
        except ValueError as error:
            return examples, gradio.skip(), gradio.skip(), f'<p class="hint">{html.escape(str(error))}</p>'
        return examples, "[]", show_examples(examples, ways), ""

    def forget_last(examples: tuple[Example, ...]) -> tuple[Any, ...]:
        return examples[:-1], gradio.skip(), show_examples(examples[:-1], ways), ""

    def forget_all() -> tuple[Any, ...]:
        return (), "[]", show_examples((), ways), ""

    with gradio.Blocks(title="mann_fast: draw", analytics_enabled=False, fill_width=True) as page:
        known = gradio.State(())
        gradio.HTML(
            "<h1>Draw and remember</h1><p class='hint'>Teach a memory symbols of your own, then draw one again. "
            "Nothing is trained, and nothing leaves this computer.</p>"
        )
        with gradio.Row(elem_id="desk"):
            with gradio.Column(scale=0, min_width=360):
                canvas = gradio.HTML(
                    "[]",
                    html_template=CANVAS,
                    css_template=CANVAS_STYLE,
                    js_on_load=CANVAS_SCRIPT,
                    apply_default_css=False,
                    elem_id="canvas",
                )
                with gradio.Row():
                    name = gradio.Textbox(
                        placeholder="its name", show_label=False, container=False, elem_id="name", scale=2
                    )
                    teach = gradio.Button("Remember", variant="primary", elem_id="remember", scale=1)
                note = gradio.HTML("", elem_id="note")
                with gradio.Row():
                    last = gradio.Button("Forget the last", size="sm")
                    everything = gradio.Button("Forget everything", size="sm")
            with gradio.Column():
                said = gradio.HTML(show_answer(learner, (), None), elem_id="answer")
        shown = gradio.HTML(show_examples((), ways), elem_id="examples")

        results = [known, canvas, shown, note]
        quiet: dict[str, Any] = {
            "show_progress": "hidden",
            "api_visibility": "private",
            "trigger_mode": "multiple",
        }
        for event, change, inputs in (
            (teach.click, remember, [canvas, name, known]),
            (name.submit, remember, [canvas, name, known]),
            (last.click, forget_last, [known]),
            (everything.click, forget_all, []),
        ):
            event(change, inputs, results, **quiet).then(answer, [canvas, known], said, **quiet)
        # gradio runs one call of a function at a time, in the order they came in: so the last answer is of the last canvas.
        canvas.input(answer, [canvas, known], said, **quiet)

    # Fonts of the system alone: gradio's own would come from elsewhere.
    theme = gradio.themes.Soft(
        primary_hue="slate",
        neutral_hue="stone",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    return page, {"theme": theme, "css": STYLE}
