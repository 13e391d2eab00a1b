"""What the tiny model is taught about BitNet: one entry a fact, in our own words.

Each fact has the noun or the question it answers, a few wordings of the answer, and the keys: short
strings that every wording contains and that an answer to this question must therefore contain.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fact:
    """`direct` is a whole question, `indirect` the same as a clause ("why bytes matter")."""

    direct: str
    indirect: str
    noun: str | None
    keys: tuple[str, ...]
    answers: tuple[str, ...]
    extra: tuple[str, ...] = ()


def what(noun: str, keys: str, *answers: str, extra: tuple[str, ...] = ()) -> Fact:
    verb = "are" if noun in PLURAL else "is"
    direct = f"What {verb} {noun}?"
    return Fact(direct, f"what {noun} {verb}", noun, tuple(keys.split("|")), answers, extra)


def ask(direct: str, indirect: str, keys: str, *answers: str, extra: tuple[str, ...] = ()) -> Fact:
    return Fact(direct, indirect, None, tuple(keys.split("|")), answers, extra)


PLURAL = {"master weights", "logits"}

FACTS = (
    # Numbers
    what(
        "a ternary weight",
        "-1, 0 or +1",
        "A ternary weight is a weight with only three possible values: -1, 0 or +1.",
        "It is a weight that can only be -1, 0 or +1.",
        extra=("Which values can a ternary weight have?", "What can a ternary weight be?"),
    ),
    what(
        "BitNet",
        "language model|ternary",
        "BitNet is a language model whose linear layers have ternary weights.",
        "BitNet is a kind of language model: its weights are ternary, so it is small and fast.",
    ),
    what(
        "absmean",
        "mean of the absolute",
        "Absmean is the mean of the absolute values of a weight matrix. "
        "It is the scale of the ternary weights.",
        "Absmean means: take the mean of the absolute values of all weights, "
        "divide by it, round, and clip to -1, 0, +1.",
        extra=("How are the weights made ternary?", "Which scale do ternary weights use?"),
    ),
    what(
        "absmax",
        "largest absolute|int8",
        "Absmax scales a vector by its largest absolute value, so that it fits into int8.",
        "Absmax takes the largest absolute value of a token and maps it to 127, the end of int8.",
        extra=("How are the activations quantized?", "How do activations become int8?"),
    ),
    what(
        "quantization",
        "fewer bits",
        "Quantization means storing numbers with fewer bits by rounding them to a small set.",
        "It is rounding numbers to a few allowed values, so that they need fewer bits.",
    ),
    what(
        "a scale",
        "multiplies|small integers",
        "A scale is one number that multiplies small integers to get back real values.",
        "It is the number that multiplies small integers so that they become real values again.",
    ),
    what(
        "int8",
        "-128 to 127",
        "Int8 is an integer of one byte. It goes from -128 to 127.",
        "It is a whole number stored in one byte, from -128 to 127.",
        extra=("Which range does int8 have?",),
    ),
    what(
        "bf16",
        "16 bits|8 for the exponent",
        "Bf16 is a float of 16 bits: one for the sign, 8 for the exponent and 7 for the fraction.",
        "It is a number format of 16 bits, with 8 for the exponent, "
        "so it has the range of a float.",
    ),
    what(
        "a trit",
        "digit|1.58",
        "A trit is a digit with three values. It carries about 1.58 bits.",
        "It is a digit that has three values, so it holds about 1.58 bits.",
    ),
    ask(
        "Why is it called 1.58 bits?",
        "why it is called 1.58 bits",
        "log2 of 3",
        "Three values carry log2 of 3 bits, and that is about 1.58.",
        "Because a choice of three values is worth log2 of 3 bits, about 1.58.",
        extra=("Where does the 1.58 come from?", "What does 1.58 mean?"),
    ),
    ask(
        "Why is zero useful as a weight?",
        "why zero is useful as a weight",
        "switches|off",
        "A zero weight switches an input off, so the model can ignore it.",
        "Zero switches a connection off: the layer can choose which inputs to ignore.",
        extra=("What does a zero weight do?",),
    ),
    what(
        "packing",
        "four weights|one byte",
        "Packing puts four weights of two bits each into one byte.",
        "It means storing four weights together in one byte, two bits for each.",
        extra=("How are ternary weights stored?", "How many weights fit in a byte?"),
    ),
    what(
        "base-3 packing",
        "five weights|243",
        "Base-3 packing puts five weights into a byte, because 3 to the power of 5 is 243.",
        "It writes five weights as one number below 243, which fits into a byte.",
        extra=("How can five trits fit in a byte?",),
    ),
    what(
        "a code",
        "weight plus one",
        "A code is the weight plus one: 0, 1 or 2. It is what the packed byte holds.",
        "It is the weight plus one, so that -1, 0, +1 become 0, 1, 2.",
    ),
    what(
        "sparsity",
        "share of|zero",
        "Sparsity is the share of weights that are zero.",
        "It is the share of zero weights in a layer.",
    ),
    ask(
        "How big is a ternary model?",
        "how big a ternary model is",
        "eight times smaller",
        "Two bits a weight make it about eight times smaller than a model of 16 bits.",
        "With two bits a weight it is eight times smaller than the same model in bf16.",
        extra=("How much memory does a ternary model save?",),
    ),
    ask(
        "Why does memory bandwidth matter?",
        "why memory bandwidth matters",
        "every weight|read",
        "For each new token every weight must be read from memory, so reading sets the speed.",
        "Because every weight has to be read once for each token, and that takes longest.",
        extra=("What limits the speed of decoding?", "Why is decoding limited by memory?"),
    ),
    what(
        "memory bandwidth",
        "bytes|each second",
        "Memory bandwidth is how many bytes the machine can read each second.",
        "It says how many bytes move from memory to the processor each second.",
    ),
    what(
        "the roofline",
        "upper limit",
        "The roofline is the upper limit of speed that memory and arithmetic allow.",
        "It is an upper limit: no program can be faster than memory and arithmetic allow.",
    ),
    ask(
        "Why does BitNet save energy?",
        "why BitNet saves energy",
        "additions|instead of",
        "It uses additions of small integers instead of multiplications of floats.",
        "Because it needs additions of integers instead of float multiplications.",
        extra=("Why does BitNet need less energy?",),
    ),
    ask(
        "Why are there no multiplications?",
        "why there are no multiplications",
        "add, subtract or skip",
        "A ternary weight can only add, subtract or skip an input, so nothing is multiplied.",
        "With weights of -1, 0, +1 you add, subtract or skip. No product is needed.",
        extra=("How can a layer work without multiplications?",),
    ),
    # One layer
    what(
        "BitLinear",
        "linear layer|int8 activations",
        "BitLinear is a linear layer with ternary weights and int8 activations.",
        "It is the linear layer of BitNet: it rounds its weights and uses int8 activations.",
    ),
    what(
        "an activation",
        "flows through|layers",
        "An activation is a number that flows through the layers while the model runs.",
        "It is a value that flows through the layers, not one that was learned.",
    ),
    what(
        "a kernel",
        "small fast program",
        "A kernel is a small fast program for one job, such as a matrix product.",
        "It is a small fast program that does the heavy work of a layer.",
    ),
    what(
        "SIMD",
        "one instruction|many numbers",
        "SIMD means that one instruction works on many numbers at once.",
        "It lets one instruction handle many numbers at the same time.",
    ),
    what(
        "an accumulator",
        "sum|int32",
        "An accumulator is the place where a sum grows. In BitNet it is an int32.",
        "It holds the running sum of products. Here it is an int32, so nothing is lost.",
    ),
    what(
        "a dot product",
        "pair by pair",
        "A dot product multiplies two vectors pair by pair and adds up the results.",
        "You multiply the numbers of two vectors pair by pair and sum them.",
    ),
    what(
        "a matrix",
        "rows and columns",
        "A matrix is a table of numbers with rows and columns.",
        "It is a table of numbers. It has rows and columns.",
    ),
    ask(
        "What happens when the scale is wrong?",
        "what happens when the scale is wrong",
        "garbage",
        "The model talks garbage: the scale must multiply here, not divide.",
        "Then you get garbage. In this checkpoint the scale multiplies, it does not divide.",
        extra=("Why does my model talk garbage?",),
    ),
    # One model
    what(
        "RMSNorm",
        "root of the mean square",
        "RMSNorm divides a vector by the root of the mean square of its numbers.",
        "It is a norm: it divides by the root of the mean square and then applies a weight.",
    ),
    what(
        "SubLN",
        "extra norm",
        "SubLN is an extra norm before the last projection of attention and of the FFN.",
        "It is an extra norm inside each block. It keeps training with ternary weights stable.",
    ),
    what(
        "squared ReLU",
        "negative|squares",
        "Squared ReLU sets negative numbers to zero and squares the others.",
        "It makes negative numbers zero and squares the positive ones.",
    ),
    what(
        "RoPE",
        "rotates|position",
        "RoPE rotates pairs of numbers in queries and keys by an angle that depends on the "
        "position.",
        "It rotates queries and keys by their position, so attention sees distances.",
        extra=("How does the model know the position of a token?",),
    ),
    what(
        "attention",
        "look back",
        "Attention lets each token look back at earlier tokens and take what it needs.",
        "It is how a token can look back at the tokens before it.",
    ),
    what(
        "a query",
        "looking for",
        "A query is the vector that says what a token is looking for.",
        "It is a vector: it tells what this token is looking for in the others.",
    ),
    what(
        "a key",
        "compared with|queries",
        "A key is the vector of a token that is compared with the queries of later tokens.",
        "It is a vector that gets compared with queries to see how well they match.",
    ),
    what(
        "a value",
        "passed on",
        "In attention a value is the vector that is passed on when a token gets attention.",
        "It is the content of a token that attention has passed on.",
    ),
    what(
        "softmax",
        "sum to one",
        "Softmax turns scores into positive numbers that sum to one.",
        "It makes probabilities out of scores: all positive, and they sum to one.",
    ),
    what(
        "the KV cache",
        "keys and values|again",
        "The KV cache stores the keys and values of earlier tokens, "
        "so they are not computed again.",
        "It keeps keys and values of the past, so that no token is computed again.",
        extra=("Why do we need a KV cache?", "What does the KV cache store?"),
    ),
    what(
        "grouped-query attention",
        "several|heads share",
        "In grouped-query attention several query heads share one key and value head.",
        "It means that several heads share the same keys and values, so the cache is smaller.",
        extra=("What is GQA?", "What does GQA mean?"),
    ),
    what(
        "a head",
        "own part",
        "A head is one small attention that looks at its own part of the vector.",
        "It is one of several attentions side by side, each with its own part of the vector.",
    ),
    what(
        "the residual stream",
        "adds its result",
        "The residual stream is the vector to which every block adds its result.",
        "It is the main road of the model: each block reads it and adds its result.",
    ),
    what(
        "an embedding",
        "vector|learned",
        "An embedding is the learned vector that stands for a token.",
        "It is a vector, one for each token, that the model has learned.",
    ),
    ask(
        "What does it mean that embeddings are tied?",
        "what tied embeddings are",
        "same matrix",
        "The same matrix turns tokens into vectors and vectors into logits.",
        "It means the input and the output of the model use the same matrix.",
        extra=("What are tied embeddings?", "Explain tied embeddings."),
    ),
    what(
        "a token",
        "piece of text",
        "A token is a piece of text, often a word or a part of one.",
        "It is a small piece of text with a number of its own.",
    ),
    what(
        "a tokenizer",
        "cuts text",
        "A tokenizer cuts text into tokens and gives each one a number.",
        "It cuts text into small pieces, the tokens, and can join them again.",
    ),
    what(
        "BPE",
        "merges|pair",
        "BPE builds a vocabulary: it merges the most frequent pair again and again.",
        "It starts from bytes and always merges the pair that occurs most.",
    ),
    what(
        "logits",
        "scores|next token",
        "Logits are the scores of all tokens for being the next token.",
        "They are scores, one for each token in the vocabulary, for the next token.",
    ),
    what(
        "prefill",
        "whole prompt",
        "Prefill is the step that reads the whole prompt at once.",
        "In prefill the model works through the whole prompt in one go.",
    ),
    what(
        "decode",
        "one token at a time",
        "Decode is the phase that makes new text, one token at a time.",
        "In decode the model writes its answer, one token at a time.",
    ),
    what(
        "greedy decoding",
        "highest",
        "Greedy decoding always takes the token with the highest logit.",
        "It always picks the highest score, so the answer is the same every time.",
    ),
    what(
        "temperature",
        "divides the logits",
        "Temperature divides the logits: low is careful, high is wild.",
        "It is a number that divides the logits before sampling. A high one gives more surprise.",
    ),
    what(
        "top-k",
        "k best",
        "Top-k sampling chooses only among the k best tokens.",
        "It keeps the k best tokens and draws one of them.",
    ),
    what(
        "a chat template",
        "marks who",
        "A chat template is the pattern that marks who says what in a chat.",
        "It marks who is speaking: system, user or assistant.",
    ),
    what(
        "a system prompt",
        "before the chat",
        "A system prompt is a message before the chat that tells the model how to behave.",
        "It stands before the chat and tells the assistant how to behave.",
    ),
    what(
        "a context window",
        "at most",
        "The context window is how many tokens the model can see at most.",
        "It is the number of tokens that the model can look at, at most.",
    ),
    what(
        "the feed-forward network",
        "each token on its own",
        "The feed-forward network works on each token on its own: up, squared ReLU, down.",
        "It is the part of a block that changes each token on its own.",
        extra=("What does the FFN do?", "What is the FFN?"),
    ),
    # Training
    what(
        "the straight-through estimator",
        "rounding|gradient",
        "The straight-through estimator lets the gradient pass through rounding unchanged.",
        "It is a trick: rounding is ignored in the backward pass, so the gradient gets through.",
        extra=("What is STE?", "What does STE mean?", "How can we train through rounding?"),
    ),
    what(
        "a gradient",
        "loss|each weight",
        "A gradient tells how the loss changes when each weight changes a little.",
        "It says in which direction the loss grows for each weight.",
    ),
    what(
        "the loss",
        "how wrong",
        "The loss is a number that says how wrong the model is.",
        "It measures how wrong the predictions are. Training makes it small.",
    ),
    what(
        "quantization-aware training",
        "rounded weights|during",
        "Quantization-aware training uses the rounded weights already during training.",
        "It means that the model sees its rounded weights during training and learns with them.",
        extra=("What is QAT?", "What does QAT mean?"),
    ),
    what(
        "master weights",
        "full precision",
        "Master weights are the weights in full precision that training updates.",
        "They are kept in full precision, and the ternary weights are made from them.",
        extra=("Why do we keep master weights?",),
    ),
    what(
        "weight decay",
        "toward zero",
        "Weight decay pulls the weights a little toward zero at each step.",
        "It is a small pull of all weights toward zero.",
    ),
    what(
        "the learning rate",
        "size of|step",
        "The learning rate sets the size of each training step.",
        "It is the size of the step that the weights take.",
    ),
    ask(
        "Why does the learning rate drop halfway?",
        "why the learning rate drops halfway",
        "stop jumping",
        "In the second half the ternary weights should stop jumping and settle.",
        "So that the weights stop jumping between values and settle down.",
    ),
    ask(
        "Why not round the weights after training?",
        "why we do not round the weights after training",
        "never learned",
        "Because the model never learned to work with rounded weights. It would lose too much.",
        "A model that never learned with ternary weights breaks when you round it.",
        extra=("Can I round a trained model to ternary?",),
    ),
    # The real thing
    ask(
        "How many layers does BitNet 2B4T have?",
        "how many layers BitNet 2B4T has",
        "30 layers",
        "BitNet 2B4T has 30 layers.",
        "It has 30 layers.",
    ),
    ask(
        "How many parameters does BitNet 2B4T have?",
        "how many parameters BitNet 2B4T has",
        "2.4 billion",
        "BitNet 2B4T has about 2.4 billion parameters.",
        "It has about 2.4 billion parameters.",
        extra=("How big is BitNet 2B4T?",),
    ),
    ask(
        "How many tokens was BitNet 2B4T trained on?",
        "how many tokens BitNet 2B4T was trained on",
        "4 trillion",
        "BitNet 2B4T was trained on 4 trillion tokens.",
        "It was trained on 4 trillion tokens.",
        extra=("What does 4T mean?",),
    ),
    ask(
        "How many heads does BitNet 2B4T have?",
        "how many heads BitNet 2B4T has",
        "20 query heads|5",
        "It has 20 query heads and 5 key and value heads.",
        "BitNet 2B4T has 20 query heads, and 5 heads for keys and values.",
    ),
    ask(
        "Who made BitNet?",
        "who made BitNet",
        "Microsoft",
        "BitNet was made by researchers at Microsoft.",
        "Researchers at Microsoft made it.",
        extra=("Where does BitNet come from?",),
    ),
    ask(
        "How large is the hidden size of BitNet 2B4T?",
        "how large the hidden size of BitNet 2B4T is",
        "2560",
        "The hidden size of BitNet 2B4T is 2560.",
        "It is 2560.",
        extra=("What is the hidden size of BitNet 2B4T?",),
    ),
    what(
        "a checkpoint",
        "files|weights",
        "A checkpoint is a set of files with the weights of a model.",
        "It is the saved state of a model: the files that hold its weights.",
    ),
    what(
        "safetensors",
        "file format|no code",
        "Safetensors is a file format for weights that can run no code when it is loaded.",
        "It is a simple file format for tensors. It holds no code, so it is safe to load.",
    ),
    what(
        "GGUF",
        "one file",
        "GGUF is a format that puts a model and its tokenizer into one file.",
        "It is a model format: everything is in one file.",
    ),
    what(
        "a language model",
        "predicts|next token",
        "A language model predicts the next token of a text.",
        "It is a program that predicts which next token fits best.",
        extra=("How does a language model work?",),
    ),
    what(
        "a parameter",
        "number|model|training",
        "A parameter is a number of the model that was learned in training.",
        "It is a number inside the model that training has set.",
    ),
    what(
        "a layer",
        "one step",
        "A layer is one step of the model: attention, then the feed-forward network.",
        "It is one step in a stack of equal blocks.",
    ),
    ask(
        "Why train on so many tokens?",
        "why we train on so many tokens",
        "small model|more",
        "A small model can get better and better when it reads more text.",
        "Because a small model needs to read more text to become good.",
    ),
)
