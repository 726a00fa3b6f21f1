// The program of deploy/cpp around a model that is no model: behind the header of its .engine lie, for one picture after
// the other, height, width and rows (int32), the input that Python had (3 x height x width float32), and the predictions
// that Python's model gave. An input that differs in one value is a fault.
#include <cstring>

#include "engine_file.h"
#include "fault.h"
#include "program.h"

namespace {

class Replay : public dcn::Model {
  public:
    explicit Replay(const std::string& path) : file_(dcn::read_engine(path)) {}

    const dcn::Metadata& metadata() const override { return file_.meta; }
    int most() const override { return file_.meta.batch; }

    std::vector<float> run(const std::vector<float>& images, int count, int height, int width) override {
        const std::size_t size = images.size() / static_cast<std::size_t>(count);
        std::vector<float> predictions;
        for (int i = 0; i < count; ++i) {
            const std::vector<int> shape = take<int>(3);
            if (shape[0] != height || shape[1] != width)
                throw dcn::Fault("the frame is " + std::to_string(height) + "x" + std::to_string(width) + ", in Python " +
                                 std::to_string(shape[0]) + "x" + std::to_string(shape[1]));
            const std::vector<float> input = take<float>(size);
            for (std::size_t n = 0; n < size; ++n)
                if (input[n] != images[size * static_cast<std::size_t>(i) + n])
                    throw dcn::Fault("value " + std::to_string(n) + " of an input differs");
            const std::size_t row = 5 + file_.meta.names.size();
            const std::vector<float> own = take<float>(static_cast<std::size_t>(shape[2]) * row);
            predictions.insert(predictions.end(), own.begin(), own.end());
        }
        return predictions;
    }

  private:
    template <typename T>
    std::vector<T> take(std::size_t count) {
        std::vector<T> values(count);
        if (at_ + count * sizeof(T) > file_.engine.size()) throw dcn::Fault("the replay is over");
        std::memcpy(values.data(), file_.engine.data() + at_, count * sizeof(T));
        at_ += count * sizeof(T);
        return values;
    }

    dcn::EngineFile file_;
    std::size_t at_ = 0;
};

}  // namespace

int main(int count, char** words) {
    return dcn::run_program(count, words, "replay", "MODEL.engine", [](const dcn::Options& options) {
        return std::make_unique<Replay>(options.model);
    });
}
