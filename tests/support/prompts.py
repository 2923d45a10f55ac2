"""200 prompts for comparing tokenizers: many scripts, emoji, numbers, prompt syntax, odd characters."""

from __future__ import annotations

ENGLISH = """
A photograph of an astronaut riding a horse on the moon, cinematic light, 35mm
a red fox under the moon
beautiful oil painting, masterpiece, best quality!! ultra-detailed...
portrait of an old fisherman, deep wrinkles, rim light, shallow depth of field, kodak portra 400
isometric room, cozy, low-poly, blender render, pastel colours, volumetric fog
the quick brown fox jumps over the lazy dog THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG
it's John's dog; they're sure we'll say I'd've done it, don't you think?
score_9, score_8_up, source_anime, 1girl, solo, looking at viewer, blush
""".strip().split("\n")

OTHER_SCRIPTS = """
Ein Bär läuft über die Straße; größer als je zuvor
un café crème à l'étage, « œuvre » naïve, garçon
el niño comió piñas en São Paulo mañana
żółta łódź płynie po jeziorze, źdźbło trawy
İstanbul'da ışıklı bir gece, şemsiyeli kız
con cáo đỏ dưới ánh trăng, tranh màu nước
рыжая лиса под луной, акварель, зимний лес
їжак у тумані, синє небо, ґанок
κόκκινη αλεπού κάτω από το φεγγάρι
水彩画、月の下の赤い狐、とても美しい
日本の古い町並み、夕焼け、ﾊﾝｶｸｶﾅ、１２３ＡＢＣ
一只红色的狐狸在月光下，水彩画，高清
臺灣夜市，霓虹燈，雨後的街道
달빛 아래 붉은 여우 수채화, 아름다운 풍경
ثعلب أحمر تحت ضوء القمر، لوحة مائية
گربه‌ای سیاه در باران، نقاشی رنگ روغن
שועל אדום לאור הירח, ציור בצבעי מים
שָׁלוֹם עִבְרִית עִם נִקּוּד
लाल लोमड़ी चाँदनी में जलरंग, सुंदर दृश्य
নদীর ধারে একটি লাল শিয়াল
சிவப்பு நரி நிலவொளியில்
สุนัขจิ้งจอกแดงใต้แสงจันทร์ ภาพสีน้ำ
ხატი წითელი მელა მთვარის ქვეშ
կարմիր աղվես լուսնի տակ
ቀይ ቀበሮ በጨረቃ ብርሃን
ᚠᚢᚦᚨᚱᚲ 𐍅𐌿𐌻𐍆𐌹𐌻𐌰 𝔣𝔯𝔞𝔨𝔱𝔲𝔯 𓀀𓁐
""".strip().split("\n")

EMOJI = """
🦊🌙 fox emoji 👩‍🚀🏽 flag 🇩🇪 heart ❤️
👨‍👩‍👧‍👦 family, 🏳️‍🌈 flag, 👍🏿 thumbs, 1️⃣2️⃣
🧑🏻‍🤝‍🧑🏿 and 🐻‍❄️ with ⛄︎ text style
🔥🔥🔥 100% 💯✨ so good ✨
(◕‿◕) ʕ•ᴥ•ʔ ¯\\_(ツ)_/¯ ʘ‿ʘ
""".strip().split("\n")

SYNTAX = """
(word:1.2)
a (red:1.3) fox ((under)) the [blue] moon
(((masterpiece))), (best quality:1.4), [[low quality]]
(nested (deeper:1.5) weights:0.8) end
\\(not a weight\\) but \\\\ escaped (half:
unbalanced ) closing (( opening :1.1) :2)
(minus:-1.5) (zero:0) (big:99999) (text:notanumber)
[from:to:0.5] {a|b|c} <lora:name:0.8> __wildcard__
a BREAK b AND c :: 2 --ar 16:9 --v 5
embedding_like thing, emb:name, <embedding>, <|endoftext|> mid text
<start_of_turn>user hello<end_of_turn> </s> <s> <pad> <unk> <bos> <eos> [INST] x [/INST]
<|im_start|>system you are<|im_end|> <|vision_start|> <extra_id_0> <0x41> <0xE2>
""".strip().split("\n")

NUMBERS = """
100% 3.14159 $5 @user #tag a_b-c/d\\e {x} ~^` "quotes" 'single'
0 1 12 123 1234 12345 1234567890 0x1F 1e-10 -7 +3 ½ ¾ Ⅳ ² ₃ ٣ ४ 五
2026-11-21T07:00:00Z 16:9 f/1.8 1/250s ISO-400 4K 8k 1920x1080 50mm
https://example.com/path?query=1&other=two#part user@example.org C:\\Users\\x
!!!??? ... --- ___ *** ||| ;;; ,,, <<<>>> (((( ]]]] {{{}}} ~~~ ``` ``` “curly” ‘quotes’ „low“ — – …
x²+y²=r² ∑∫√∞≈≠≤≥±×÷ → ⇒ ∀∃ €£¥₹ © ® ™ § ¶ † • ‰
for (int i = 0; i < n; ++i) { a[i] += b[i]; }  // code
{"json": [1, 2.5, null, true], "nested": {"key": "value"}}
""".strip().split("\n")

ODD = [
    "",
    " ",
    "  leading and   double  spaces, trailing  ",
    "\n",
    "\n\n\n",
    "first line\nsecond line\r\nthird\rfourth",
    "tab\there and\t\tthere",
    "vertical\x0btab form\x0cfeed",
    "null\x00byte bell\x07 escape\x1b[31m delete\x7f",
    "no-break\u00a0space thin\u2009space ideographic\u3000space",
    "zero\u200bwidth joiner\u200d non\u200cjoiner bom\ufeff soft\u00adhyphen",
    "right\u200fto left\u200emarks \u202eoverride\u202c",
    "combining e\u0301 versus \u00e9, a\u030a n\u0303, Z\u0351\u036b\u0343\u036a\u0302",
    "ＦＵＬＬＷＩＤＴＨ ﬁ ﬂ ligature ½ ① ™ ㎏ ℃ ﷺ",
    "\u2581lower one eighth block \u2581\u2581 twice",
    "line\u2028separator paragraph\u2029separator next\u0085line",
    "private \ue000 use, replacement \ufffd, not a character \U0001fffe",
    "\U0001f9ff\U00020000\U0002f800 beyond the first plane",
    "a",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "supercalifragilisticexpialidocious antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft",
    ", ".join(["masterpiece, best quality"] * 40),
    " ".join(f"word{number}" for number in range(150)),
    "水彩画" * 60,
    "🦊" * 50,
    "." * 200,
    " " * 100 + "x",
]

_BASE = [*ENGLISH, *OTHER_SCRIPTS, *EMOJI, *SYNTAX, *NUMBERS, *ODD]
_FIRST, _SECOND = [*OTHER_SCRIPTS, *EMOJI, *NUMBERS], [*reversed(OTHER_SCRIPTS), *SYNTAX, *ENGLISH]
# Two scripts in one prompt, cut in the middle of words.
_MIXED = [
    f"{first[: 7 + number % 20]} {second[number % 5 :: 1 + number % 2]}"
    for number, (first, second) in enumerate(zip(_FIRST * 3, _SECOND * 3, strict=False))
]

PROMPTS: list[str] = [*_BASE, *_MIXED][:200]
assert len(PROMPTS) == len(set(PROMPTS)) == 200
