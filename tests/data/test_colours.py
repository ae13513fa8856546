"""One look per component: terminals, the page of one record and the report take it from one table."""

import re

from pact_fast.data.colours import LOOKS, css
from pact_fast.data.tokens import Component


def test_every_component_has_a_look_of_its_own():
    assert set(LOOKS) == set(Component)
    for looks in ([x.terminal for x in LOOKS.values()], [x.light for x in LOOKS.values()]):
        assert len(set(looks)) == len(looks)


def test_the_rules_colour_every_component_in_light_and_dark():
    light, dark = css().split("@media")
    for component, look in LOOKS.items():
        for part, (ink, paper) in ((light, look.light), (dark, look.dark)):
            assert f".{component.name.lower()}{{color:{ink};background:{paper}}}" in part


def test_ink_stands_out_from_its_paper():
    """Contrast of at least 4.5 (WCAG AA) wherever a paper is given."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for look in LOOKS.values():
        for ink, paper in (look.light, look.dark):
            if re.fullmatch("#[0-9a-f]{6}", paper):
                light, dark = sorted((luminance(ink), luminance(paper)), reverse=True)
                assert (light + 0.05) / (dark + 0.05) >= 4.5, look
