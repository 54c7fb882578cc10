"""How an app runs a package: the Swift for its model card."""

from __future__ import annotations

LANGUAGE = "swift"

_SWIFT = """\
// Xcode compiles {name} to {stem}.mlmodelc. The tokenizer is in {name}/{tokenizer}: add that folder to the app too.
import CoreML
import Generation
import Models
import Tokenizers

let tokenizer = try await AutoTokenizer.from(modelFolder: tokenizerFolder)
let compiled = Bundle.main.url(forResource: "{stem}", withExtension: "mlmodelc")!
let model = try LanguageModel.loadCompiled(url: compiled, tokenizer: tokenizer)  // without one it asks the Hub
await model.resetState()
var config = GenerationConfig(maxNewTokens: 64)
config.eosTokenId = tokenizer.eosTokenId  // the one token that ends it
let text = await model.generate(
    config: config, prompt: "Once upon a time", model: model.callAsFunction, tokenizer: tokenizer)
"""


def snippet(name: str) -> str:
    """Swift that generates text with swift-transformers from a package called `name`; Markdown puts it in a fence."""
    from backends.coreml.package import TOKENIZER

    return _SWIFT.format(name=name, stem=name.removesuffix(".mlpackage"), tokenizer=TOKENIZER.as_posix())
