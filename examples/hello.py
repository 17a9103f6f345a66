from minipool import Pool


class Greeter:
    def __init__(self, greeting):
        self.greeting, self.count = greeting, 0

    def greet(self, name):
        self.count += 1
        return f"{self.greeting}, {name}! You are number {self.count}."


if __name__ == "__main__":  # workers import this file, and must not open a pool of their own
    with Pool(Greeter, args=("Hello",), size=4) as pool:
        with pool.checkout() as w:
            print(w.call("greet", "Ada"))
            print(w.greet("Grace"))
