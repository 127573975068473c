"""A text for the comparison of two models: prose, code, digits, and several scripts."""

# Common tokenizers make 850 to 2,400 tokens of it: the usual comparison, of 640, repeats nothing.
PASSAGE = '''\
The old lighthouse stood at the end of the pier, and nobody in the village remembered who had
built it. Every evening at half past six the keeper climbed its 217 steps, wound the clockwork,
and lit the lamp. "A ship that sees us," she used to say, "is a ship that comes home." In the
winter of 1887 the sea was frozen for nineteen days, so no ship came at all; she lit the lamp
anyway.

A reader of a lamp needs three facts: how often it turns, how far it shines, and in what colour.
The first is a matter of gears. With 96 teeth on the large wheel and 12 on the small one, the
lens turns once in eight seconds, or 7.5 times a minute. The second depends on the height of the
lamp above the water. The horizon lies about 3.57 * sqrt(h) kilometres away, where h is in
metres: 27.7 km for a lamp 60 m high. The third is a question of taste, they say; but red glass
swallows four fifths of the light, so most lamps are white.

```python
import math

def horizon(height_m: float, eye_m: float = 2.0) -> float:
    """Distance in km at which a light is seen from a deck."""
    if height_m < 0 or eye_m < 0:
        raise ValueError(f"heights are not negative: {height_m}, {eye_m}")
    return 3.57 * (math.sqrt(height_m) + math.sqrt(eye_m))

for name, height in {"North Point": 60, "Old Pier": 31.5, "Gull Rock": 12}.items():
    print(f"{name:<12} {horizon(height):6.2f} km")
```

| light       | height | period | range   |
|-------------|-------:|-------:|--------:|
| North Point |   60 m |    8 s | 32.7 km |
| Old Pier    | 31.5 m |    5 s | 25.1 km |
| Gull Rock   |   12 m |   10 s | 17.4 km |

User: Which of these lights would I see from a small boat, twenty kilometres off the coast?
Assistant: Two of them. North Point reaches 32.7 km and Old Pier 25.1 km, both more than 20 km. Gull
Rock reaches only 17.4 km, so it is still below the horizon for you.

灯台は港の入り口に立っています。夜になると、白い光が八秒ごとに海を照らします。
那座灯塔建于一八八七年，高六十米，天气好的时候三十公里外也能看见。
그 등대는 오래되었지만 아직도 매일 밤 불을 밝힌다.
Старый маяк виден издалека, даже когда идёт снег.
Le phare s'éteint à l'aube ; el faro duerme de día; der Leuchtturm schläft nie ganz.

Years later a letter arrived, addressed to "The Keeper, Old Pier". It held a photograph of a
ship, a pressed flower, and one sentence in careful handwriting: "We saw you on the ninth night,
and turned round." She read it twice. Then she put it into the drawer with the spare wicks,
wound the clockwork, and climbed the stairs, counting under her breath: 1, 2, 3, 4, 5, 6, 7, 8,
9, 10, and so on up to the top, where the wind was, and the dark, and the great white lamp that
had to be lit before seven.
'''
