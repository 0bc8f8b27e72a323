//! From the text of an expression to its tree. Unknown names, functions and wrong forms are mistakes here and not when a
//! request comes; the tree's depth is bounded, because evaluating and dropping it recurse.

use super::Mistake;
use super::lex::{Token, tokens};
use super::syntax::{Field, Function, Kind, Literal, Map, Node, Operator, Quantifier};

/// Bytes of one expression.
pub const MAX_SOURCE: usize = 4 * 1024;
/// Nodes above one another.
pub const MAX_DEPTH: usize = 64;

const ROOTS: &str = "request, source, destination, claims, now";

struct Parser {
    tokens: Vec<(usize, Token)>,
    next: usize,
    depth: usize,
    /// Variables of `exists` and the like that are open.
    bound: Vec<String>,
}

type Parsed = Result<Node, Mistake>;

pub(super) fn parse(text: &str) -> Parsed {
    if text.len() > MAX_SOURCE {
        return Err(Mistake { at: 1, message: format!("longer than {MAX_SOURCE} bytes") });
    }
    let mut parser = Parser { tokens: tokens(text)?, next: 0, depth: 0, bound: Vec::new() };
    let node = parser.expression()?;
    if parser.peek() != &Token::End {
        return Err(parser.mistake(format!("{} is not expected here", parser.shown())));
    }
    match &node.kind {
        Kind::Literal(Literal::Bool(_)) | Kind::Bound(_) | Kind::Index(..) | Kind::Select(..) | Kind::Has(..) => {}
        Kind::Not(_) | Kind::Choose(..) | Kind::Each(..) => {}
        Kind::Binary(operator, ..) if !is_arithmetic(*operator) => {}
        Kind::Call(Function::StartsWith | Function::EndsWith | Function::Contains, _) => {}
        _ => return Err(Mistake { at: node.at, message: "is never true or false".to_owned() }),
    }
    Ok(node)
}

fn is_arithmetic(operator: Operator) -> bool {
    use Operator::{Divided, Minus, Modulo, Plus, Times};
    matches!(operator, Plus | Minus | Times | Divided | Modulo)
}

impl Parser {
    fn peek(&self) -> &Token {
        self.tokens.get(self.next).map_or(&Token::End, |(_, token)| token)
    }

    fn at(&self) -> usize {
        self.tokens.get(self.next).map_or(1, |(at, _)| *at)
    }

    fn mistake(&self, message: String) -> Mistake {
        Mistake { at: self.at(), message }
    }

    fn shown(&self) -> String {
        match self.peek() {
            Token::Name(name) => format!("`{name}`"),
            Token::Int(number) => number.to_string(),
            Token::Double(number) => number.to_string(),
            Token::Text(_) => "a text".to_owned(),
            Token::Sign(sign) => format!("`{sign}`"),
            Token::End => "the end".to_owned(),
        }
    }

    fn sign(&mut self, wanted: &str) -> bool {
        let found = matches!(self.peek(), Token::Sign(sign) if *sign == wanted);
        self.next += usize::from(found);
        found
    }

    fn expect(&mut self, wanted: &str) -> Result<(), Mistake> {
        if self.sign(wanted) {
            return Ok(());
        }
        Err(self.mistake(format!("expected `{wanted}`, found {}", self.shown())))
    }

    /// One level deeper, with a bound. Chains of operators count too: their trees are as deep as they are long.
    fn deeper(&mut self, read: impl FnOnce(&mut Parser) -> Parsed) -> Parsed {
        if self.depth >= MAX_DEPTH {
            return Err(
                self.mistake(format!("deeper than {MAX_DEPTH} levels; many values are written as `x in [...]`"))
            );
        }
        self.depth += 1;
        let node = read(self);
        self.depth -= 1;
        node
    }

    fn expression(&mut self) -> Parsed {
        self.deeper(|parser| {
            let at = parser.at();
            let condition = parser.chain(0)?;
            if !parser.sign("?") {
                return Ok(condition);
            }
            let one = parser.expression()?;
            parser.expect(":")?;
            let other = parser.expression()?;
            Ok(Node { at, kind: Kind::Choose(Box::new(condition), Box::new(one), Box::new(other)) })
        })
    }

    /// Operators from those that bind least to those that bind most.
    fn chain(&mut self, level: usize) -> Parsed {
        use Operator::{
            And, Divided, Equal, Greater, GreaterOrEqual, In, Less, LessOrEqual, Minus, Modulo, Or, Plus, Times,
            Unequal,
        };
        const LEVELS: [&[(&str, Operator)]; 5] = [
            &[("||", Or)],
            &[("&&", And)],
            &[
                ("==", Equal),
                ("!=", Unequal),
                ("<=", LessOrEqual),
                (">=", GreaterOrEqual),
                ("<", Less),
                (">", Greater),
                ("in", In),
            ],
            &[("+", Plus), ("-", Minus)],
            &[("*", Times), ("/", Divided), ("%", Modulo)],
        ];
        let Some(operators) = LEVELS.get(level) else { return self.unary() };
        let mut node = self.chain(level + 1)?;
        let before = self.depth;
        loop {
            let at = self.at();
            let found = operators.iter().find(|(sign, _)| match self.peek() {
                Token::Sign(found) => found == sign,
                Token::Name(name) => name == sign,
                _ => false,
            });
            let Some((_, operator)) = found else { break };
            self.next += 1;
            if self.depth >= MAX_DEPTH {
                let message = format!("deeper than {MAX_DEPTH} levels; many values are written as `x in [...]`");
                return Err(Mistake { at, message });
            }
            self.depth += 1;
            let other = self.chain(level + 1)?;
            node = Node { at, kind: Kind::Binary(*operator, Box::new(node), Box::new(other)) };
        }
        self.depth = before;
        Ok(node)
    }

    fn unary(&mut self) -> Parsed {
        let at = self.at();
        if self.sign("!") {
            let of = self.deeper(Parser::unary)?;
            return Ok(Node { at, kind: Kind::Not(Box::new(of)) });
        }
        if self.sign("-") {
            if let Token::Int(number) = *self.peek() {
                self.next += 1;
                let negative = 0_i64.checked_sub_unsigned(number);
                let value = negative.ok_or_else(|| self.mistake(format!("-{number} is too small")))?;
                return self.members(Node { at, kind: Kind::Literal(Literal::Int(value)) });
            }
            let of = self.deeper(Parser::unary)?;
            return Ok(Node { at, kind: Kind::Minus(Box::new(of)) });
        }
        let primary = self.primary()?;
        self.members(primary)
    }

    /// `.name`, `.call(...)` and `[...]` behind a value.
    fn members(&mut self, mut node: Node) -> Parsed {
        let before = self.depth;
        loop {
            if self.depth >= MAX_DEPTH {
                return Err(self.mistake(format!("deeper than {MAX_DEPTH} levels")));
            }
            let at = self.at();
            if self.sign(".") {
                self.depth += 1;
                let name = self.name()?;
                node = if self.sign("(") { self.method(at, node, &name)? } else { select(at, node, name)? };
            } else if self.sign("[") {
                self.depth += 1;
                let index = self.expression()?;
                self.expect("]")?;
                node = Node { at, kind: Kind::Index(Box::new(node), Box::new(index)) };
            } else {
                self.depth = before;
                return Ok(node);
            }
        }
    }

    fn name(&mut self) -> Result<String, Mistake> {
        let Token::Name(name) = self.peek() else {
            return Err(self.mistake(format!("expected a name, found {}", self.shown())));
        };
        let name = name.clone();
        self.next += 1;
        Ok(name)
    }

    fn primary(&mut self) -> Parsed {
        let at = self.at();
        let token = self.peek().clone();
        let literal = |kind| Ok(Node { at, kind: Kind::Literal(kind) });
        if !matches!(token, Token::End) {
            self.next += 1;
        }
        match token {
            Token::Int(number) => {
                let number = i64::try_from(number);
                literal(Literal::Int(number.map_err(|_| Mistake { at, message: "too large".to_owned() })?))
            }
            Token::Double(number) => literal(Literal::Double(number)),
            Token::Text(text) => literal(Literal::Text(text)),
            Token::Name(name) => self.named(at, name),
            Token::Sign("(") => {
                let node = self.expression()?;
                self.expect(")")?;
                Ok(node)
            }
            Token::Sign("[") => Ok(Node { at, kind: Kind::List(self.arguments("]")?) }),
            Token::Sign("{") => Err(Mistake { at, message: "maps of one's own are not supported".to_owned() }),
            Token::Sign(sign) => Err(Mistake { at, message: format!("`{sign}` is not expected here") }),
            Token::End => Err(Mistake { at, message: "something is missing at the end".to_owned() }),
        }
    }

    fn arguments(&mut self, close: &str) -> Result<Vec<Node>, Mistake> {
        let mut arguments = Vec::new();
        while !self.sign(close) {
            if !arguments.is_empty() {
                self.expect(",")?;
                // A list may end in a comma.
                if close == "]" && self.sign(close) {
                    break;
                }
            }
            arguments.push(self.expression()?);
        }
        Ok(arguments)
    }

    fn named(&mut self, at: usize, name: String) -> Parsed {
        if let Some(index) = self.bound.iter().rposition(|bound| *bound == name) {
            return Ok(Node { at, kind: Kind::Bound(index) });
        }
        let kind = match name.as_str() {
            "true" => Kind::Literal(Literal::Bool(true)),
            "false" => Kind::Literal(Literal::Bool(false)),
            "null" => Kind::Literal(Literal::Null),
            "now" => Kind::Field(Field::Now),
            "claims" => Kind::Map(Map::Claims),
            "request" | "source" | "destination" => return self.variable(at, &name),
            _ if self.sign("(") => return self.function(at, &name),
            _ => {
                return Err(Mistake { at, message: format!("unknown name `{name}`: the variables are {ROOTS}") });
            }
        };
        Ok(Node { at, kind })
    }

    /// `request.method` and the like.
    fn variable(&mut self, at: usize, root: &str) -> Parsed {
        let fields = || Field::ALL.iter().filter(|(of, ..)| *of == root);
        let maps = || Map::ALL.iter().filter(|(of, ..)| *of == root);
        let known: Vec<&str> = fields().map(|(_, name, _)| *name).chain(maps().map(|(_, name, _)| *name)).collect();
        let missing = |at, what: &str| Mistake { at, message: format!("{what}: `{root}` has {}", known.join(", ")) };
        if !self.sign(".") {
            return Err(missing(at, "a field is missing"));
        }
        let named_at = self.at();
        let name = self.name()?;
        let field = fields().find(|(_, known, _)| *known == name).map(|(_, _, field)| Kind::Field(*field));
        let map = maps().find(|(_, known, _)| *known == name).map(|(_, _, map)| Kind::Map(*map));
        match field.or(map) {
            Some(kind) => Ok(Node { at, kind }),
            None => Err(missing(named_at, &format!("unknown field `{name}`"))),
        }
    }

    fn function(&mut self, at: usize, name: &str) -> Parsed {
        if name == "has" {
            return self.has(at);
        }
        let function = match name {
            "size" => Function::Size,
            "int" => Function::Int,
            "string" => Function::Text,
            "double" => Function::Double,
            "timestamp" => Function::Timestamp,
            "duration" => Function::Duration,
            _ => return Err(unknown(at, name)),
        };
        let arguments = self.arguments(")")?;
        call(at, name, function, arguments, 1)
    }

    /// `has(x.y)`: whether it is there.
    fn has(&mut self, at: usize) -> Parsed {
        let of = self.expression()?;
        self.expect(")")?;
        match of.kind {
            Kind::Select(of, name) => Ok(Node { at, kind: Kind::Has(of, name) }),
            Kind::Field(field) if field != Field::Now => {
                Ok(Node { at, kind: Kind::Has(Box::new(Node { at, kind: Kind::Field(field) }), String::new()) })
            }
            _ => {
                let message = "has() takes x.y; for x['y'] write `'y' in x`".to_owned();
                Err(Mistake { at, message })
            }
        }
    }

    /// A call behind a value. The bracket was read.
    fn method(&mut self, at: usize, of: Node, name: &str) -> Parsed {
        let quantifier = match name {
            "exists" => Some(Quantifier::Exists),
            "all" => Some(Quantifier::All),
            "exists_one" => Some(Quantifier::ExistsOne),
            _ => None,
        };
        if let Some(quantifier) = quantifier {
            countable(at, &of)?;
            let variable = self.name()?;
            self.expect(",")?;
            self.bound.push(variable);
            let body = self.expression();
            self.bound.pop();
            let body = body?;
            self.expect(")")?;
            return Ok(Node { at, kind: Kind::Each(quantifier, Box::new(of), Box::new(body)) });
        }
        let (function, count) = match name {
            "size" => (Function::Size, 1),
            "startsWith" => (Function::StartsWith, 2),
            "endsWith" => (Function::EndsWith, 2),
            "contains" => (Function::Contains, 2),
            "lowerAscii" => (Function::LowerAscii, 1),
            "getHours" => (Function::Hours, 1),
            "getMinutes" => (Function::Minutes, 1),
            "getDayOfWeek" => (Function::DayOfWeek, 1),
            "getDayOfMonth" => (Function::DayOfMonth, 1),
            "getMonth" => (Function::Month, 1),
            "getFullYear" => (Function::FullYear, 1),
            "matches" => {
                let message = "matches() is not supported: use startsWith, endsWith, contains, or path templates";
                return Err(Mistake { at, message: message.to_owned() });
            }
            _ => return Err(unknown(at, name)),
        };
        let mut arguments = vec![of];
        arguments.extend(self.arguments(")")?);
        call(at, name, function, arguments, count)
    }
}

fn unknown(at: usize, name: &str) -> Mistake {
    Mistake { at, message: format!("unknown function `{name}`") }
}

fn call(at: usize, name: &str, function: Function, arguments: Vec<Node>, count: usize) -> Parsed {
    if arguments.len() != count {
        return Err(Mistake { at, message: format!("`{name}` has another number of arguments") });
    }
    if function == Function::Size {
        countable(at, &arguments[0])?;
    }
    Ok(Node { at, kind: Kind::Call(function, arguments) })
}

/// Headers and queries can be asked by name only.
fn countable(at: usize, of: &Node) -> Result<(), Mistake> {
    match of.kind {
        Kind::Map(map @ (Map::Headers | Map::Query)) => {
            Err(Mistake { at, message: format!("{} can be asked by name only: {}['x']", map.name(), map.name()) })
        }
        _ => Ok(()),
    }
}

fn select(at: usize, of: Node, name: String) -> Parsed {
    match of.kind {
        Kind::Literal(_) | Kind::Field(_) | Kind::List(_) => {
            Err(Mistake { at, message: format!("what stands before `.{name}` has no fields") })
        }
        _ => Ok(Node { at, kind: Kind::Select(Box::new(of), name) }),
    }
}
