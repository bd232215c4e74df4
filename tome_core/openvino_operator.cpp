// Matching and merging as one operator of OpenVINO: tome_core.matching and tome_core.merging, for a batch on one thread.
//
// Inputs: tokens (B, N, C) and keys (B, N, num_heads * D), both float32 or both bfloat16, and sizes (B, N), float32.
// Outputs: merged tokens (B, N - r, C) and their sizes (B, N - r). All arithmetic is float32.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>
#include <openvino/op/op.hpp>

// Without a name, so that two libraries in a process, for different CPUs, share neither code nor memory.
namespace {

// A tile of similarities is ROWS src by two vectors of dst. Its sums must fit into the registers: with 16 lanes on a CPU
// without AVX-512 they did not, and merging took several times as long.
#ifdef __AVX512F__
constexpr int64_t LANES = 16, ROWS = 4;
#else
constexpr int64_t LANES = 8, ROWS = 4;
#endif
typedef float Lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t Indices __attribute__((vector_size(4 * LANES)));

int64_t vectors(int64_t length) { return (length + LANES - 1) / LANES; }

struct BFloat16 {
    uint16_t bits;
    operator float() const {
        const uint32_t wide = uint32_t(bits) << 16;
        float value;
        std::memcpy(&value, &wide, sizeof value);
        return value;
    }
    static BFloat16 nearest(float value) {  // ties to even; NaN stays one
        uint32_t wide;
        std::memcpy(&wide, &value, sizeof wide);
        const uint32_t rounded = wide + 0x7fff + ((wide >> 16) & 1);
        return {uint16_t((value == value ? rounded : wide | 0x400000) >> 16)};
    }
};
void store(float& place, float value) { place = value; }
void store(BFloat16& place, float value) { place = BFloat16::nearest(value); }

struct Shape {
    int64_t N, C, num_heads, D, r, num_prefix_tokens;
    int64_t first_src() const { return num_prefix_tokens + num_prefix_tokens % 2; }
    int64_t first_dst() const { return num_prefix_tokens + 1 - num_prefix_tokens % 2; }
    int64_t num_src() const { return (N - first_src() + 1) / 2; }
    int64_t num_dst() const { return (N - first_dst() + 1) / 2; }
};

struct Proposals {
    std::vector<float> best;       // each src's highest similarity
    std::vector<int64_t> partner;  // the dst it is to, the first of equals
};

// Keys of one token, summed over heads and scaled to length 1: D floats, zeros behind them to whole vectors.
template <class T>
void metric_of(const T* keys, const Shape& of, Lanes* metric) {
    float* sum = reinterpret_cast<float*>(metric);
    std::fill(metric, metric + vectors(of.D), Lanes{});
    for (int64_t head = 0; head < of.num_heads; ++head)
        for (int64_t d = 0; d < of.D; ++d) sum[d] += float(keys[head * of.D + d]);
    Lanes squares{};
    for (int64_t v = 0; v < vectors(of.D); ++v) squares += metric[v] * metric[v];
    float square = 0;
    for (int64_t lane = 0; lane < LANES; ++lane) square += squares[lane];
    const float scale = 1 / std::max(std::sqrt(square), 1e-12f);
    for (int64_t v = 0; v < vectors(of.D); ++v) metric[v] *= scale;
}

template <class T>
Proposals propose(const T* keys, const Shape& of) {
    const int64_t S = of.num_src(), K = of.num_dst(), width = vectors(K) + vectors(K) % 2, depth = vectors(of.D);
    thread_local std::vector<Lanes> memory;  // kept: fresh memory costs more than what is done to it
    memory.resize(S * depth + of.D * width + depth);
    Lanes *const src = memory.data(), *const dst = src + S * depth, *const metric = dst + of.D * width;
    std::fill(dst, metric, Lanes{});  // dst lie side by side in lanes
    float *const columns = reinterpret_cast<float*>(dst), *const values = reinterpret_cast<float*>(metric);
    for (int64_t token = of.num_prefix_tokens; token < of.N; ++token) {
        const int64_t at = (token - of.num_prefix_tokens) / 2;
        const T* own = keys + token * of.num_heads * of.D;
        if (token % 2 == 0) {
            metric_of(own, of, src + at * depth);
            continue;
        }
        metric_of(own, of, metric);
        for (int64_t d = 0; d < of.D; ++d) columns[d * width * LANES + at] = values[d];
    }
    const float lowest = -std::numeric_limits<float>::infinity();
    Indices lane;
    for (int64_t l = 0; l < LANES; ++l) lane[l] = int32_t(l);
    Proposals made{std::vector<float>(S), std::vector<int64_t>(S)};
    for (int64_t first = 0; first < S; first += ROWS) {
        const float* rows[ROWS];
        Lanes best[ROWS];
        Indices partner[ROWS] = {};
        for (int64_t i = 0; i < ROWS; ++i) {
            rows[i] = reinterpret_cast<float*>(src + std::min(first + i, S - 1) * depth);
            best[i] = Lanes{} + lowest;
        }
        for (int64_t w = 0; w < width; w += 2) {
            Lanes tile[ROWS][2] = {};
            const Lanes* column = dst + w;
            for (int64_t d = 0; d < of.D; ++d, column += width)
                for (int64_t i = 0; i < ROWS; ++i) {
                    tile[i][0] += rows[i][d] * column[0];
                    tile[i][1] += rows[i][d] * column[1];
                }
            for (int64_t part = 0; part < 2; ++part) {
                const Indices j = lane + int32_t((w + part) * LANES);
                for (int64_t i = 0; i < ROWS; ++i) {
                    // False for what is not a number, which is similar to nothing.
                    const Indices better = (tile[i][part] > best[i]) & (j < int32_t(K));
                    best[i] = better ? tile[i][part] : best[i];
                    partner[i] = better ? j : partner[i];
                }
            }
        }
        for (int64_t i = 0; i < std::min(ROWS, S - first); ++i) {
            int64_t at = 0;
            for (int64_t l = 1; l < LANES; ++l)
                if (best[i][l] > best[i][at] || (best[i][l] == best[i][at] && partner[i][l] < partner[i][at])) at = l;
            made.best[first + i] = best[i][at];
            made.partner[first + i] = partner[i][at];
        }
    }
    return made;
}

template <class T>
void merge(const T* x, const T* keys, const float* size, T* merged, float* merged_size, const Shape& of) {
    const Proposals made = propose(keys, of);
    const int64_t first_src = of.first_src(), first_dst = of.first_dst(), K = of.num_dst(), C = of.C;
    std::vector<int64_t> order(of.num_src());
    std::iota(order.begin(), order.end(), 0);
    std::partial_sort(order.begin(), order.begin() + of.r, order.end(), [&](int64_t a, int64_t b) {
        return made.best[a] > made.best[b] || (made.best[a] == made.best[b] && a < b);
    });
    order.resize(of.r);
    std::sort(order.begin(), order.end());

    const auto keep = [&](int64_t token) {
        std::copy_n(x + token * C, C, merged);
        merged += C;
        *merged_size++ = size[token];
    };
    for (int64_t token = 0; token < of.num_prefix_tokens; ++token) keep(token);
    auto next = order.begin();
    for (int64_t i = 0; i < of.num_src(); ++i)
        if (next != order.end() && *next == i)
            ++next;
        else
            keep(first_src + 2 * i);

    for (int64_t j = 0; j < K; ++j) merged_size[j] = size[first_dst + 2 * j];
    for (const int64_t i : order) merged_size[made.partner[i]] += size[first_src + 2 * i];
    std::vector<float> sum(C);
    for (int64_t j = 0; j < K; ++j, merged += C) {
        const int64_t token = first_dst + 2 * j;
        if (merged_size[j] == size[token]) {
            std::copy_n(x + token * C, C, merged);
            continue;
        }
        const auto add = [&](int64_t from) {
            const float weight = size[from] / merged_size[j];
            for (int64_t c = 0; c < C; ++c) sum[c] += weight * float(x[from * C + c]);
        };
        std::fill(sum.begin(), sum.end(), 0.0f);
        add(token);
        for (const int64_t i : order)
            if (made.partner[i] == j) add(first_src + 2 * i);
        for (int64_t c = 0; c < C; ++c) store(merged[c], sum[c]);
    }
}

class MergeTokens : public ov::op::Op {
public:
    OPENVINO_OP("MergeTokens", "tome");
    MergeTokens() = default;
    MergeTokens(const ov::OutputVector& inputs, int64_t r, int64_t num_prefix_tokens, int64_t num_heads)
        : Op(inputs), r(r), num_prefix_tokens(num_prefix_tokens), num_heads(num_heads) {
        constructor_validate_and_infer_types();
    }

    void validate_and_infer_types() override {
        ov::PartialShape tokens = get_input_partial_shape(0), sizes = get_input_partial_shape(2);
        tokens[1] = tokens[1] - r;
        sizes[1] = sizes[1] - r;
        set_output_type(0, get_input_element_type(0), tokens);
        set_output_type(1, get_input_element_type(2), sizes);
    }

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
        return std::make_shared<MergeTokens>(inputs, r, num_prefix_tokens, num_heads);
    }

    bool visit_attributes(ov::AttributeVisitor& visitor) override {
        visitor.on_attribute("r", r);
        visitor.on_attribute("num_prefix_tokens", num_prefix_tokens);
        visitor.on_attribute("num_heads", num_heads);
        return true;
    }

    bool has_evaluate() const override { return true; }

    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
        const auto type = inputs[0].get_element_type();
        if (type != inputs[1].get_element_type() || inputs[2].get_element_type() != ov::element::f32) return false;
        if (type == ov::element::f32) return evaluate_in<float>(outputs, inputs);
        return type == ov::element::bf16 && evaluate_in<BFloat16>(outputs, inputs);
    }

private:
    template <class T>
    bool evaluate_in(ov::TensorVector& outputs, const ov::TensorVector& inputs) const {
        const ov::Shape tokens = inputs[0].get_shape();
        const int64_t B = tokens[0], N = tokens[1], C = tokens[2], width = inputs[1].get_shape()[2], M = N - r;
        const T *x = static_cast<const T*>(inputs[0].data()), *keys = static_cast<const T*>(inputs[1].data());
        const float* size = inputs[2].data<const float>();
        T* merged = static_cast<T*>(outputs[0].data());
        float* merged_size = outputs[1].data<float>();
        const Shape of{N, C, num_heads, width / num_heads, r, num_prefix_tokens};
        for (int64_t b = 0; b < B; ++b)
            merge(x + b * N * C, keys + b * N * width, size + b * N, merged + b * M * C, merged_size + b * M, of);
        return true;
    }

    int64_t r = 0, num_prefix_tokens = 0, num_heads = 1;
};

}  // namespace

OPENVINO_CREATE_EXTENSIONS(std::vector<ov::Extension::Ptr>({std::make_shared<ov::OpExtension<MergeTokens>>()}));
