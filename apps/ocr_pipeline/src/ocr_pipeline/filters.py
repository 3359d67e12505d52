"""What a line of text belongs to: the nameplate, a meter, a pole's engraving, a telecom label, something
else.

By pattern first (a meter says kWh, a telecom label says FIBRA), then by place: a line without a mark of its
own beside
marked ones of one foreign cluster belongs to them. Only nameplate lines reach stage 2, so a meter's number
in the crop
cannot become a serial number.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from ocr_pipeline.geometry import Box, around
from ocr_pipeline.stages import Line, LineClass, PoleIdContext
from ocr_pipeline.words import fold

# Marks that no nameplate carries. Word borders on folded text; "KV" and "V" alone say nothing.
METER = re.compile(
    r"\bKW[H4]\b|\bK?WH/|\bKVARH\b|\bMEDIDOR|\bLEITURA\b|\bIMP/KWH|\bPULSOS?\b|\bCL(ASSE)?\.? ?[AB]\b"
    r"|\bINMETRO\b|\b\d{2,3} ?\(\d{2,3}\) ?A\b|\bELETRONICO [MP]\w+FASICO|\bCONSUMIDOR|\bUC:? ?\d"
)
TELECOM = re.compile(
    r"\bFIBRA|\bOPTIC[AO]S?\b|\bTELECOM|\bTELEFON|\bINTERNET\b|\bVIVO\b|\bCLARO\b|\bTIM\b|\bOI S/?A\b|\bNET\b"
    r"|\bCABO OPT|\bFO-? ?\d{2}|\bATENCAO\b|\bCTO ?[-:]? ?\d|\bCEO ?[-:]? ?\d|\b0800\b|\bTV A CABO"
)
POLE = re.compile(
    r"\bDAN\b|\b\d{3,4} ?DAN\b|\bD?C ?\d{1,2} ?/ ?\d{3,4}\b"
    r"|\b\d{1,2} ?/ ?\d{3,4} ?DAN\b|\bPOSTE\b|\bCONCRETO\b"
    r"|\bENGAST|\b\d{1,2} ?M ?[-/] ?\d{3,4}\b|\bNBR 8451\b"
)
NAMEPLATE = re.compile(
    r"(?<![A-Z])K[VU]A\b|\bTRANSFORM(?:ADOR|ER)|\bPOT(ENCIA|\.)|\bTENS(AO|OES)\b|\bFUSIVEL\b|\bELO\b|\bSERIE\b|\bFABRIC|\bFASES?\b"
    r"|\bIMPEDANCIA|\bNBI\b|\bNBR 5440|\bOLEO\b|\bLIGACAO\b|\bPATRIMONIO\b|\bMATRICULA\b|\bAUTO ?-?PROTEGIDO"
    r"|\bDERIVAC|\bPRIMARI|\bSECUNDARI|\bMASSA\b|\bFREQUENCIA\b"
    r"|\b(?:HIGH|LOW) VOLTAGE|\bTENSION|\bIMPEDANCE|\bFUSE LINK|\bSELF.?PROT"
    r"|\bTEMP\.? RISE|\bB\.?I\.?L\b|\bACEITE\b"
)
UTILITY = re.compile(r"[0-9] ?K[VU]A\b|\b(?:PATRIM\w*|TOMBAMENTO)\W*[0-9]{3}")
UTILITY_WORDS = 3
BARE_TAG = re.compile(
    r"[^0-9A-Z]*(?:[0-9]{5,9}|15|30|45|75|112[.,]5|150|225|300)[^0-9A-Z]*$"
)  # no word beside it
NEAR = 1.2  # of a line's height: closer lines of one cluster are one label
FOREIGN = (LineClass.METER, LineClass.TELECOM, LineClass.POLE)


def mark(text: str) -> LineClass | None:
    """The class that the text alone gives away, or None. A nameplate's words win over foreign ones."""
    folded = fold(text)
    if NAMEPLATE.search(folded):
        return LineClass.NAMEPLATE
    for pattern, kind in ((METER, LineClass.METER), (TELECOM, LineClass.TELECOM), (POLE, LineClass.POLE)):
        if pattern.search(folded):
            return kind
    return None


def classify(lines: Sequence[Line], context: PoleIdContext) -> list[Line]:
    """The lines with their classes, in the same order.

    In a crop of a plate what has no mark is the nameplate's unless it stands with a foreign label; without a
    detected plate it must stand with the nameplate's own lines; for a pole it is the pole's unless it stands
    with others.
    """
    marks = [mark(line.text) for line in lines]
    groups = clusters([line.box for line in lines])
    kinds: list[LineClass] = []
    last: LineClass | None = None  # mark, among lines without boxes: only their order tells what is beside
    for at, found in enumerate(marks):
        if lines[at].box is None:
            last = found or last
        beside = [marks[other] for other in groups[at]]
        own = beside.count(LineClass.NAMEPLATE)
        foreign = max(FOREIGN, key=beside.count)
        if found is not None:  # an odd word in the midst of a nameplate too: no value is lost with it
            kinds.append(found)
        elif lines[at].box is None and last in FOREIGN:
            kinds.append(last)
        elif beside.count(foreign) > own:
            kinds.append(foreign)
        elif own:
            kinds.append(LineClass.NAMEPLATE)
        else:
            kinds.append(_unmarked(context))
    return [replace(line, kind=kind) for line, kind in zip(lines, kinds, strict=True)]


def utility_plate(lines: Sequence[Line]) -> bool:
    """Whether classified lines are those of a utility's plate: power or asset tag, and no other label's."""
    own = [fold(line.text) for line in lines if line.kind is LineClass.NAMEPLATE]
    if sum(NAMEPLATE.search(text) is not None for text in own) > UTILITY_WORDS:
        return False  # a manufacturer's nameplate says much more
    if any(UTILITY.search(text) for text in own):
        return True
    return all(line.kind is LineClass.NAMEPLATE for line in lines) and any(
        BARE_TAG.match(text) for text in own
    )


def _unmarked(context: PoleIdContext) -> LineClass:
    """What a line is that nothing marks: in a plate's crop the plate's, else nobody's."""
    if context in (PoleIdContext.NAMEPLATE, PoleIdContext.TRANSFORMER_PLATE):
        return LineClass.NAMEPLATE
    return LineClass.OTHER


def clusters(boxes: Sequence[Box | None]) -> list[list[int]]:
    """For each line the indexes of the lines of its cluster. Lines without boxes are one cluster."""
    parent = list(range(len(boxes)))

    def root(at: int) -> int:
        while parent[at] != at:
            parent[at] = parent[parent[at]]
            at = parent[at]
        return at

    for one in range(len(boxes)):
        for other in range(one):
            if _near(boxes[one], boxes[other]):
                parent[root(one)] = root(other)
    members: dict[int, list[int]] = {}
    for at in range(len(boxes)):
        members.setdefault(root(at), []).append(at)
    return [members[root(at)] for at in range(len(boxes))]


def _near(one: Box | None, other: Box | None) -> bool:
    if one is None or other is None:
        return one is None and other is None
    reach = NEAR * min(one.height, other.height)
    grown = Box(one.left - 2 * reach, one.top - reach, one.right + 2 * reach, one.bottom + reach)
    return grown.overlap(other) > 0


def extent(lines: Sequence[Line]) -> Box | None:
    """The box around all lines that have one."""
    boxes = [line.box for line in lines if line.box is not None]
    return around(boxes) if boxes else None
