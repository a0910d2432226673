"""Models of transformers and open_clip with random weights: their own scores, and brute force over both sides."""

import copy
import itertools
import logging
import math

import pytest
import torch
from torch.nn.functional import normalize
from vision_transformers import images

import fastshap_kernels as fk
import fastshap_vision as fv

transformers = pytest.importorskip("transformers")
open_clip = pytest.importorskip("open_clip")
tokenizers = pytest.importorskip("tokenizers")

WORDS = ["a", "red", "blue", "green", "dog", "cat", "car", "on", "the", "grass", "sky", "with", "two"]
TEXTS = ["a red dog", "a blue car on the grass"]
VISION = {
    "image_size": 16,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
TEXT = {
    "vocab_size": 4 + len(WORDS),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 14,
    "bos_token_id": 1,
    "eos_token_id": 3,
    "pad_token_id": 0,
}
#: open_clip's, whose tokenizer has 49 408 tokens.
OPEN_VISION = {"image_size": 16, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2, "mlp_ratio": 1.5}
OPEN_TEXT = {"context_length": 10, "width": 32, "heads": 2, "layers": 2}
OPEN_TIMM = {"timm_model_name": "test_vit", "timm_model_pretrained": False, "timm_pool": "token", "image_size": 160}
OPEN_RESNET = {"image_size": 64, "width": 8, "layers": [1, 1, 1, 1], "head_width": 32}


def tokenizer(begins):
    """Words of a few letters, with a start (CLIP's) or without (SigLIP's)."""
    special = ["<pad>", "<start>", "<unknown>", "<end>"]
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate([*special, *WORDS])}, unk_token="<unknown>")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<start> $A <end>" if begins else "$A <end>", special_tokens=[("<start>", 1), ("<end>", 3)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<start>", eos_token="<end>", pad_token="<pad>", unk_token="<unknown>"
    )


def with_noise(model):
    """Random biases and norms too."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def hugging_face_clip():
    torch.manual_seed(0)
    config = transformers.CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=16)
    return with_noise(transformers.CLIPModel(config)), tokenizer(begins=True)


def siglip():
    torch.manual_seed(0)
    text = TEXT | {"projection_size": 32}
    return with_noise(
        transformers.SiglipModel(transformers.SiglipConfig(vision_config=VISION, text_config=text))
    ), tokenizer(begins=False)


def of_open_clip(kind=open_clip.CLIP, vision=OPEN_VISION, text=OPEN_TEXT, **options):
    torch.manual_seed(0)
    return with_noise(kind(16, vision, text, **options)), open_clip.SimpleTokenizer(context_length=10)


MAKE = {
    "CLIP, transformers": hugging_face_clip,
    "SigLIP, transformers": siglip,
    "CLIP, open_clip": lambda: of_open_clip(quick_gelu=True),
    "timm's tower, open_clip": lambda: of_open_clip(
        open_clip.CustomTextCLIP,
        OPEN_TIMM,
        OPEN_TEXT | {"no_causal_mask": True, "pool_type": "last"},
        init_logit_bias=-10.0,
    ),
    "ResNet, open_clip": lambda: of_open_clip(vision=OPEN_RESNET),
}


@pytest.fixture(scope="module", params=MAKE)
def made(request):
    """A model of images and texts, and what wraps it."""
    model, words = MAKE[request.param]()
    return model, fv.ImageTextModel(model, words)


def own_scores(model, wrapped, pictures, texts):
    """As the library computes them, from its own call on its own tokens."""
    ids = wrapped.text_tower.tokens("test", texts).ids
    if hasattr(model, "get_logits"):
        return model.get_logits(pictures, ids)[0]
    return model(input_ids=ids, pixel_values=pictures).logits_per_image


@torch.no_grad()
def test_scores_are_the_librarys_own(made):
    model, wrapped = made
    pictures = images(3, wrapped.input_size[1])
    expected = own_scores(model, wrapped, pictures, TEXTS)
    torch.testing.assert_close(wrapped(pictures, TEXTS), expected, rtol=1e-5, atol=1e-5)
    pairs = wrapped.explain_pair(pictures[:2], TEXTS, "text")
    torch.testing.assert_close(pairs.score, expected.diagonal(), rtol=1e-5, atol=1e-5)
    if wrapped.tower is not None:
        torch.testing.assert_close(wrapped.convert(TEXTS)(pictures), expected, rtol=1e-5, atol=1e-5)


def test_known_towers_become_timms_and_drop_tokens(made):
    model, wrapped = made
    if isinstance(getattr(model, "visual", None), open_clip.modified_resnet.ModifiedResNet):
        assert wrapped.tower is None
        assert wrapped.grid == (8, 8)
        with pytest.raises(fv.UnsupportedModelError, match=r"none of timm's .* explain_pair"):
            wrapped.convert(TEXTS)
        return
    classifier = wrapped.convert(TEXTS)
    assert classifier.removal == "token"
    assert classifier.game.packs
    explanation = classifier.explain(images(2, wrapped.input_size[1]), "all")
    assert explanation.values.shape == (2, classifier.players, 2)
    assert explanation.efficiency_gap() < 1e-5


def embeddings_of_patches(wrapped, picture):
    """{patches: unit embedding}, one coalition at a time."""
    players = wrapped.grid[0] * wrapped.grid[1]
    game = fv.convert(wrapped.tower, texts=torch.eye(wrapped.encode_texts(TEXTS).shape[1]))
    found = {}
    for present in itertools.product((False, True), repeat=players):
        bits = fk.pack_bits(torch.tensor(present)[None, None])
        found[present] = game.coalition_values(picture, bits)[0, 0]
    return found


def embeddings_of_words(model, ids, plays):
    """{words: unit embedding}: without an absent word, the others keeping their places, by the model itself."""
    found = {}
    for present in itertools.product((False, True), repeat=int(plays.sum())):
        kept = ~plays
        kept[plays] = torch.tensor(present)
        if hasattr(model, "get_text_features"):
            embedding = shorter_text(model, ids[kept], kept.nonzero()[:, 0])
        else:
            embedding = shorter_open_clip_text(model, ids[kept], kept.nonzero()[:, 0])
        found[present] = normalize(embedding, dim=1)[0]
    return found


def shorter_text(model, ids, places):
    found = model.get_text_features(input_ids=ids[None], position_ids=places[None])
    return found if isinstance(found, torch.Tensor) else found.pooler_output


def shorter_open_clip_text(model, ids, places):
    """The text without its absent words, as rows of the position table are chosen for it."""
    text = getattr(model, "text", model)
    table, mask = text.positional_embedding.data, text.attn_mask
    try:
        text.positional_embedding.data = table[places]
        text.attn_mask = None if mask is None else mask[: len(ids), : len(ids)]
        return model.encode_text(ids[None])
    finally:
        text.positional_embedding.data, text.attn_mask = table, mask


def shapley(values, players):
    """φ of v as a function of a tuple of booleans, by the definition."""
    phi = []
    for player in range(players):
        total = 0.0
        for present in itertools.product((False, True), repeat=players):
            if present[player]:
                continue
            joined = tuple(is_in or other == player for other, is_in in enumerate(present))
            size = sum(present)
            weight = math.factorial(size) * math.factorial(players - size - 1) / math.factorial(players)
            total += weight * float(values(joined) - values(present))
        phi.append(total)
    return torch.tensor(phi)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["CLIP, transformers", "SigLIP, transformers", "CLIP, open_clip"])
def test_patches_and_words_have_their_exact_values(kind):
    model, words = MAKE[kind]()
    wrapped = fv.ImageTextModel(model, words)
    picture, text = images(1, 16), ["a blue dog"]
    tokens = wrapped.text_tower.tokens("test", text)
    assert tokens.words == [["a", "blue", "dog"]]
    of_image = embeddings_of_patches(wrapped, picture)
    of_text = embeddings_of_words(model, tokens.ids[0], tokens.players[0])

    def score(patches, words):
        return math.exp(wrapped.logit_scale) * of_image[patches] @ of_text[words] + wrapped.logit_bias

    all_patches, all_words = (True,) * 4, (True,) * 3
    expected = {
        "image": shapley(lambda present: score(present, all_words), 4),
        "text": shapley(lambda present: score(all_patches, present), 3),
        "both": shapley(lambda present: score(present[:4], present[4:]), 7),
    }
    for players, phi in expected.items():
        found = wrapped.explain_pair(picture, text, players)
        parts = [part[0] for part in (found.image, found.text) if part is not None]
        torch.testing.assert_close(torch.cat(parts), phi, rtol=1e-4, atol=1e-4)
        assert phi.abs().max() > 1e-3
        assert found.efficiency_gap() < 1e-5
        assert (found.image is None, found.text is None) == (players == "text", players == "image")
    torch.testing.assert_close(found.null, score((False,) * 4, (False,) * 3).reshape(1), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_sixteen_players_have_the_values_of_all_their_coalitions():
    model, words = hugging_face_clip()
    wrapped = fv.ImageTextModel(model, words)
    picture, text = images(1, 16), ["a red dog with two blue cat on the green grass car"]
    tokens = wrapped.text_tower.tokens("test", text)
    patches, number = 4, len(tokens.words[0])
    found = wrapped.explain_pair(picture, text, "both", coalitions=2**16)
    assert (number, found.evaluations, found.errors) == (12, 2**16, [None])
    present = torch.arange(2 ** (patches + number))[:, None] >> torch.arange(patches + number) & 1
    of_image = torch.stack(list(embeddings_of_patches(wrapped, picture).values()))
    order = (present[:, :patches] * 2 ** torch.arange(patches - 1, -1, -1)).sum(1)  # as itertools counts
    mask = torch.ones(2**number, tokens.ids.shape[1], dtype=torch.int64)
    mask[:, tokens.players[0]] = torch.arange(2**number)[:, None] >> torch.arange(number) & 1
    out = model.get_text_features(input_ids=tokens.ids.expand(len(mask), -1), attention_mask=mask)
    of_text = normalize(out if isinstance(out, torch.Tensor) else out.pooler_output, dim=1)
    which = (present[:, patches:] * 2 ** torch.arange(number)).sum(1)
    values = math.exp(wrapped.logit_scale) * (of_image[order] * of_text[which]).sum(1).double()
    phi = torch.cat([found.image[0], found.text[0]])
    torch.testing.assert_close(phi.double(), by_definition(values, present), rtol=1e-4, atol=1e-4)


def by_definition(values, present):
    """φ of all coalitions' values (2^n,), in the order of their bits (2^n, n)."""
    players = present.shape[1]
    size = present.sum(1)
    weight = torch.tensor([1 / (players * math.comb(players - 1, s)) for s in range(players)], dtype=torch.float64)
    phi = []
    for player in range(players):
        without = (present[:, player] == 0).nonzero()[:, 0]
        phi.append((weight[size[without]] * (values[without + 2**player] - values[without])).sum())
    return torch.stack(phi)


def test_estimates_come_near():
    wrapped = fv.ImageTextModel(*hugging_face_clip())
    text = ["a red dog on the car"]
    exact = wrapped.explain_pair(images(1, 16), text, "both")
    found = wrapped.explain_pair(images(1, 16), text, "both", coalitions=400, seed=1)
    assert (exact.evaluations, found.evaluations) == (2**10, 402)
    error = torch.cat([(found.image - exact.image)[0], found.text[0] - exact.text[0]])
    assert error.norm() < 0.3 * torch.cat([exact.image[0], exact.text[0]]).norm()
    assert (error.abs() < 6 * found.errors[0] + 1e-5).all()
    assert found.efficiency_gap() < 1e-5


def test_pixels_are_removed_where_the_tower_is_none_of_timms():
    model, words = MAKE["ResNet, open_clip"]()
    wrapped = fv.ImageTextModel(model, words, grid=(2, 2))
    pictures, text = images(1, 64), ["a dog"]
    found = wrapped.explain_pair(pictures, text)
    scores = fv.MaskedImageGame(lambda masked: wrapped(masked, text), (2, 2))
    torch.testing.assert_close(found.image, fv.exact_values(scores, pictures).phi[..., 0].float())


def test_only_words_play():
    model, words = hugging_face_clip()
    tower = fv.ImageTextModel(model, words).text_tower
    found = tower.tokens("test", ["a red dog", "sky"])
    assert found.words == [["a", "red", "dog"], ["sky"]]
    assert found.players.tolist() == [[False, True, True, True, False], [False, True, False, False, False]]
    # "!" is the token 0, which open_clip pads with too.
    found = fv.ImageTextModel(*of_open_clip()).text_tower.tokens("test", ["a dog!", "!"])
    assert found.words == [["a", "dog", "!"], ["!"]]


def test_an_absent_word_is_forgotten_or_refused(monkeypatch):
    model, words = of_open_clip()
    wrapped = fv.ImageTextModel(model, words)
    encode = model.encode_text
    # A tower that reads a word past its attention.
    monkeypatch.setattr(model, "encode_text", lambda ids: encode(ids) + ids[:, 1:2])
    with pytest.raises(fv.UnsupportedModelError, match="absent would still act"):
        wrapped.explain_pair(images(1, 16), ["a dog"], "text")
    assert wrapped.explain_pair(images(1, 16), ["a dog"], "image").image.shape == (1, 4)


def test_a_folder_of_from_pretrained_gives_the_same(tmp_path):
    model, words = hugging_face_clip()
    model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    loaded = transformers.CLIPModel.from_pretrained(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    found, expected = (fv.ImageTextModel(*pair)(images(2, 16), TEXTS) for pair in (loaded, (model, words)))
    torch.testing.assert_close(found, expected)


def test_modes_stay_and_the_model_learns_nothing():
    model, words = hugging_face_clip()
    wrapped = fv.ImageTextModel(model, words).train()
    model.vision_model.eval()
    before = [module.training for module in wrapped.modules()]
    found = wrapped.explain_pair(images(1, 16), ["a dog"], "both")
    assert [module.training for module in wrapped.modules()] == before
    assert not found.score.requires_grad


def test_bad_arguments_are_named():
    model, words = hugging_face_clip()
    wrapped = fv.ImageTextModel(model, words)
    picture = images(1, 16)
    with pytest.raises(ValueError, match="`model` must be a CLIPModel"):
        fv.ImageTextModel(torch.nn.Linear(2, 2), words)
    with pytest.raises(ValueError, match="`tokenizer` must be a tokenizer"):
        fv.ImageTextModel(model, str)
    with pytest.raises(ValueError, match="`texts` must be 1 texts"):
        wrapped.explain_pair(picture, TEXTS)
    for texts in ("a dog", [], [1]):
        with pytest.raises(ValueError, match="a list of one text or more"):
            wrapped.explain_pair(picture, texts)
    with pytest.raises(ValueError, match="`players` must be one of"):
        wrapped.explain_pair(picture, ["a dog"], "words")
    with pytest.raises(ValueError, match="one word or more"):
        wrapped.explain_pair(picture, [""], "text")
    assert wrapped.explain_pair(picture, [""], "both").text[0].shape == (0,)
    with pytest.raises(ValueError, match="tensor"):
        wrapped.explain_pair(images(1, 24), ["a dog"])


def test_a_model_of_images_of_any_size_is_refused():
    vision = {key: value for key, value in VISION.items() if key != "image_size"} | {"num_patches": 4}
    config = transformers.Siglip2Config(vision_config=vision, text_config=TEXT | {"projection_size": 32})
    with pytest.raises(fv.UnsupportedModelError, match="any size"):
        fv.ImageTextModel(transformers.Siglip2Model(config), tokenizer(begins=False))


def test_a_copy_is_a_model_of_its_own():
    wrapped = fv.ImageTextModel(*of_open_clip())
    twin = copy.deepcopy(wrapped)
    assert twin.text_tower.model is twin.model
    torch.nn.init.zeros_(twin.model.text_projection)
    assert twin.encode_texts(TEXTS).abs().max() == 0
    assert wrapped.encode_texts(TEXTS).abs().max() > 0


def test_a_picture_has_the_words_coloured():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    model, words = hugging_face_clip()
    wrapped = fv.ImageTextModel(model, words)
    pictures = images(2, 16)
    found = wrapped.explain_pair(pictures, TEXTS, "both")
    figure, (above, below) = found.plot(pictures, index=1)
    assert [text.get_text() for text in below.texts] == TEXTS[1].split()
    limit = max(float(found.image[1].abs().max()), float(found.text[1].abs().max()))
    for text, value in zip(below.texts, found.text[1].tolist(), strict=True):
        red, _, blue, _ = text.get_bbox_patch().get_facecolor()
        assert abs(value) < 0.02 * limit or (red > blue) == (value > 0)
    assert above.images
    for players in ("image", "text"):
        wrapped.explain_pair(pictures, TEXTS, players).plot(pictures)
    with pytest.raises(ValueError, match="index"):
        found.plot(pictures, index=2)
    matplotlib.pyplot.close("all")
    figure.clear()


def test_nothing_is_logged_for_known_towers(caplog):
    with caplog.at_level(logging.WARNING, "fastshap_vision"):
        fv.ImageTextModel(*hugging_face_clip())
    assert not [record for record in caplog.records if record.name.startswith("fastshap_vision")]
